"""Validate the arguments of the sampler. Raises UserError with the value, the bound and the fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from PIL import Image

from madgen.config.schema import InitConfig, SamplingParams
from madgen.images.decoding import read_picture
from madgen.images.placement import PlacedPicture
from madgen.sampling.call_inputs import CallInputs
from madgen.sampling.pictures import placed
from madgen.types import Box, MaskFile, MaskPicture, NoiseBlend, Prompt, Ramp, Region, Task
from madgen.utils.console import plural
from madgen.utils.errors import UserError
from madgen.utils.validation import listed, number, switch, text, texts, whole


@dataclass(frozen=True)
class PanoramaBatch:
    """Panoramas of one size that are sampled together; the lists have an item for each panorama."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    regions: list[list[Region]]
    inputs: CallInputs | None = None
    """Objects in place of seeds, prompts and the schedule."""
    blends: list[NoiseBlend | None] | None = None
    """Blends of the initial noise; None: as the method's `noise.blend` says for samples of one prompt."""
    pictures: list[PlacedPicture] = field(default_factory=list)
    """One for each panorama to start from; none: start from noise."""
    control: list[Image.Image] | None = None
    """Control pictures of a ControlNet, RGB; None: there is no ControlNet."""
    style: list[Image.Image] | None = None
    """Style pictures of an IP-Adapter, RGB; None: there is no IP-Adapter."""

    @classmethod
    def from_tasks(cls, tasks: Sequence[Task], init: InitConfig) -> PanoramaBatch:
        """Collect tasks of one size, and read their pictures as `init` says."""
        prompts = [task.prompt for task in tasks]
        return cls(
            prompts[0].height,
            prompts[0].width,
            [prompt.text for prompt in prompts],
            [prompt.negative for prompt in prompts],
            [task.seed for task in tasks],
            [list(prompt.regions) for prompt in prompts],
            blends=[task.blend for task in tasks],
            pictures=[picture for prompt in prompts if (picture := placed(prompt, init)) is not None],
            control=_read(prompts, "control"),
            style=_read(prompts, "style"),
        )

    @property
    def all_negatives(self) -> list[str]:
        """Return all negative prompts, including those of regions."""
        return [*self.negatives, *(region.negative for regions in self.regions for region in regions)]

    @property
    def all_texts(self) -> list[str]:
        """Return all prompts and negative prompts, except negative prompts of regions, which mostly repeat them."""
        return [*self.prompts, *self.negatives, *(region.text for regions in self.regions for region in regions)]


def _read(prompts: Sequence[Prompt], column: str) -> list[Image.Image] | None:
    """Read the pictures that prompts name in a column; None if they name none."""
    files = [prompt.pictures[column] for prompt in prompts if column in prompt.pictures]
    return [read_picture(file, f"{column} picture") for file in files] or None


PARAMS: dict[str, Callable[[str, Any], Any]] = {
    "num_inference_steps": partial(whole, minimum=1),
    "guidance_scale": partial(number, minimum=0),
    "guidance_steps": lambda name, steps: tuple(whole(f"each of {name}", step) for step in listed(name, steps)),
    "loop": switch,
    "decode": text,
    "strength": partial(number, minimum=0),
}
"""Validation of each argument that replaces one of the sampler's `params`."""


def parse_params(params: SamplingParams, **arguments: Any) -> SamplingParams:
    """Return `params` with the `arguments` that are not None. Raises UserError."""
    given = {name: PARAMS[name](name, value) for name, value in arguments.items() if value is not None}
    if "strength" in given:
        given["init"] = replace(params.init, strength=given.pop("strength"))
    return replace(params, **given)


def parse_batch(
    height: Any, width: Any, prompts: Any, negative_prompts: Any, seeds: Any, regions: Any
) -> PanoramaBatch:
    """Validate the arguments of `PanoramaSampler.sample`; None stands for no negative prompts or no regions."""
    if height is None or width is None:
        raise UserError("height and width are needed, in pixels; sampler(prompt) has defaults for them")
    height, width = whole("height", height), whole("width", width)
    prompts, seeds = texts("prompts", prompts), [_parse_seed(seed) for seed in listed("seeds", seeds)]
    negatives = [""] * len(prompts) if negative_prompts is None else texts("negative_prompts", negative_prompts)
    if not len(prompts) == len(negatives) == len(seeds) or not prompts:
        raise UserError(
            "prompts, negative_prompts and seeds must be non-empty lists of one length, "
            f"got {len(prompts)}, {len(negatives)} and {len(seeds)} items"
        )
    parsed: list[list[Region]] = [[] for _ in prompts]
    if regions is not None:
        parsed = [
            [_parse_region(region) for region in listed("each of regions", own)] for own in listed("regions", regions)
        ]
    if len(parsed) != len(prompts):
        raise UserError(f"regions must have a list for each of {plural(len(prompts), 'prompt')}, got {len(parsed)}")
    return PanoramaBatch(height, width, prompts, negatives, seeds, parsed)


def _parse_seed(value: Any) -> int:
    seed = whole("a seed", value)
    if not 0 <= seed < 2**64:
        raise UserError(f"a seed must be a whole number of 0..2^64 - 1, got {seed}")
    return seed


def _parse_region(region: Any) -> Region:
    if not isinstance(region, Region):
        raise UserError(f"regions must be a list of madgen.Region for each prompt, got an item {region!r}")
    text("a region's text", region.text)
    text("a region's negative", region.negative)
    mask = region.mask
    if isinstance(mask, Box):
        for name in ("left", "top", "right", "bottom"):
            whole(f"a box's {name}", getattr(mask, name))
    elif not isinstance(mask, MaskPicture | Ramp) and not (
        isinstance(mask, MaskFile) and isinstance(mask.path, str | PathLike)
    ):
        raise UserError(f"a region's mask must be a madgen.Box or a madgen.MaskFile of a path, got {mask!r}")
    return region


def check_device(name: str | torch.device) -> torch.device:
    """Return the device; UserError if it is unknown or not available."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"unknown device {name!r}; use for example 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(name)!r}: PyTorch finds no GPU on this machine; use 'cpu'")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={str(name)!r}: {str(error).splitlines()[0]}; use 'cpu' or 'cuda'") from error
    return device


def check_latents(latents: Any, channels: int) -> None:
    """Raise UserError unless `latents` are shaped like those that `PanoramaSampler.sample` returns."""
    if not isinstance(latents, torch.Tensor) or latents.ndim != 4 or latents.shape[1] != channels:
        actual = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise UserError(f"latents must be a tensor [B, {channels}, height/f, width/f], got {actual}")
