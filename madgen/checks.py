"""What may be asked of the sampler: UserError names what is wrong and the way out."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch

from madgen.backbones import BackboneSpec
from madgen.errors import UserError
from madgen.types import Region

DECODES = ("auto", "whole", "tiled")


def check_numbers(
    seeds: Sequence[int], guidance_scale: float, num_inference_steps: int, chunk_views: int | None = None
) -> None:
    """Finite, and whole where they count something."""
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise UserError(f"guidance_scale must be a finite number >= 0, got {guidance_scale}")
    if not _lies(num_inference_steps, range(1, sys.maxsize)):
        raise UserError(f"num_inference_steps must be a whole number >= 1, got {num_inference_steps}")
    if chunk_views is not None and not _lies(chunk_views, range(1, sys.maxsize)):
        raise UserError(f"chunk_views must be a whole number of views >= 1 or None, got {chunk_views}")
    for seed in seeds:
        if not _lies(seed, range(2**64)):
            raise UserError(f"a seed must be a whole number of 0..2^64 - 1, got {seed}")


def check_whole(**numbers: int | None) -> None:
    """By name; None is one that was not given."""
    for name, number in numbers.items():
        if number is not None and not _lies(number, range(-sys.maxsize, sys.maxsize)):
            raise UserError(f"{name} must be a whole number, got {number!r}")


def _lies(value: Any, where: range) -> bool:
    """Whether it is a whole number, of Python or of another library, and one of these."""
    try:
        return operator.index(value) in where
    except TypeError:
        return False


def check_guidance_steps(steps: Sequence[int], guidance_scale: float, count: int) -> None:
    """The first step with guidance and the one after the last, of `count`."""
    whole = len(steps) == 2 and all(_lies(step, range(count + 1)) for step in steps)
    if guidance_scale <= 1 or not whole or steps[0] >= steps[1]:
        raise UserError(
            f"guidance_steps must be (first, end), 0 <= first < end <= {count} steps, and guidance_scale > 1, "
            f"got {tuple(steps)} and {guidance_scale}"
        )


def check_negative_prompts(spec: BackboneSpec, negatives: Sequence[str], guidance_scale: float) -> None:
    """A negative prompt that could have no effect is refused, not ignored."""
    if any(negatives) and (spec.guidance_embedded or guidance_scale <= 1):
        embeds = spec.guidance_embedded
        reason = "the backbone embeds its guidance" if embeds else f"guidance_scale={guidance_scale} is <= 1"
        raise UserError(f"a negative prompt has no effect: {reason}; leave negative_prompt empty")


def check_regions(regions: Sequence[Sequence[Region]] | None, prompts: int) -> None:
    """A list of them for each prompt."""
    if regions is None:
        return
    if len(regions) != prompts:
        raise UserError(f"need a list of regions for each of {prompts} prompts, got {len(regions)}")
    for part in (part for parts in regions for part in parts):
        if not isinstance(part, Region):
            raise UserError(f"regions must hold lists of madgen.Region, got {part!r}")


def check_device(name: str | torch.device) -> torch.device:
    """One that is here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name!r} is none that PyTorch knows; cpu and cuda are two of them") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(name)!r}: PyTorch finds no GPU here; take cpu")
    return device


def check_decode(decode: str) -> None:
    """A way to decode."""
    if decode not in DECODES:
        raise UserError(f"decode must be 'auto', 'whole' or 'tiled', got {decode!r}")
