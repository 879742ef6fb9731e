"""What may be asked of the sampler: UserError names what is wrong and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec
from madgen.types import Box, MaskFile, MaskPicture, Ramp, Region
from madgen.utils.errors import UserError
from madgen.utils.validation import listed, text, texts, whole

DECODES = ("auto", "whole", "tiled")


@dataclass(frozen=True)
class Asked:
    """What each panorama of a batch is of."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    regions: list[list[Region]]

    @property
    def all_negatives(self) -> list[str]:
        """Also of regions."""
        return [*self.negatives, *(region.negative for parts in self.regions for region in parts)]

    @property
    def all_texts(self) -> list[str]:
        """Whatever a text encoder sees but regions' negative prompts, which are mostly the panorama's."""
        return [*self.prompts, *self.negatives, *(region.text for parts in self.regions for region in parts)]


def asked(prompts: Any, negative_prompts: Any, seeds: Any, regions: Any) -> Asked:
    """The arguments of `PanoramaSampler.sample`, as many of each; None are no negative prompts, no regions."""
    prompts, seeds = texts("prompts", prompts), [_seed(seed) for seed in listed("seeds", seeds)]
    negatives = [""] * len(prompts) if negative_prompts is None else texts("negative_prompts", negative_prompts)
    if not len(prompts) == len(negatives) == len(seeds) or not prompts:
        raise UserError(
            f"need lists, not empty, of as many prompts as negative prompts and seeds, "
            f"got {len(prompts)}, {len(negatives)}, {len(seeds)}"
        )
    parts: list[list[Region]] = [[] for _ in prompts]
    if regions is not None:
        parts = [[_region(part) for part in listed("each of regions", one)] for one in listed("regions", regions)]
    if len(parts) != len(prompts):
        raise UserError(f"need a list of regions for each of {len(prompts)} prompts, got {len(parts)}")
    return Asked(prompts, negatives, seeds, parts)


def _seed(value: Any) -> int:
    seed = whole("a seed", value)
    if not 0 <= seed < 2**64:
        raise UserError(f"a seed must be a whole number of 0..2^64 - 1, got {seed}")
    return seed


def _region(part: Any) -> Region:
    if not isinstance(part, Region):
        raise UserError(f"regions must hold a list of madgen.Region for each prompt, got {part!r} in it")
    text("a region's text", part.text)
    text("a region's negative", part.negative)
    mask = part.mask
    if isinstance(mask, Box):
        for name in ("left", "top", "right", "bottom"):
            whole(f"a box's {name}", getattr(mask, name))
    elif not isinstance(mask, MaskPicture | Ramp) and not (
        isinstance(mask, MaskFile) and isinstance(mask.path, str | PathLike)
    ):
        raise UserError(f"a region's mask must be a madgen.Box or a madgen.MaskFile of a path, got {mask!r}")
    return part


def guidance_range(steps: Any, guidance_scale: float, count: int) -> range:
    """The steps with guidance, from the first and the one after the last, of `count`."""
    found = [whole("each of guidance_steps", step) for step in listed("guidance_steps", steps)]
    if guidance_scale <= 1 or len(found) != 2 or not 0 <= found[0] < found[1] <= count:
        raise UserError(
            f"guidance_steps must be (first, end), 0 <= first < end <= {count} steps, and guidance_scale > 1, "
            f"got {tuple(found)} and {guidance_scale}"
        )
    return range(*found)


def check_negative_prompts(spec: BackboneSpec, negatives: Sequence[str], guidance_scale: float) -> None:
    """A negative prompt that could have no effect is refused, not ignored."""
    if any(negatives) and (spec.guidance_embedded or guidance_scale <= 1):
        embeds = spec.guidance_embedded
        reason = "the backbone embeds its guidance" if embeds else f"guidance_scale={guidance_scale} is <= 1"
        raise UserError(f"a negative prompt has no effect: {reason}; leave negative_prompt empty")


def check_device(name: str | torch.device) -> torch.device:
    """One that is here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={name!r} is none that PyTorch knows; cpu and cuda are two of them") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(name)!r}: PyTorch finds no GPU here; take cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={str(name)!r}: {str(error).splitlines()[0]}; take cpu or cuda") from error
    return device


def check_decode(decode: str) -> None:
    """A way to decode."""
    if not isinstance(decode, str) or decode not in DECODES:
        raise UserError(f"decode must be 'auto', 'whole' or 'tiled', got {decode!r}")


def check_latents(latents: Any, channels: int) -> None:
    """As `sample` gives them."""
    if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != channels:
        what = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"latents must be a tensor [B, {channels}, height/f, width/f], got {what}")
