"""The initial noise of a batch: drawn from seeds or generators, and blended and aligned as `method.noise` says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from madgen.config.schema import BlendConfig
from madgen.diffusion.denoise import Generators
from madgen.diffusion.noise import align, blend, in_patches
from madgen.diffusion.reference import with_annex
from madgen.sampling.geometry import Geometry
from madgen.sampling.inputs import PanoramaBatch
from madgen.types import NoiseBlend
from madgen.utils.errors import UserError
from madgen.utils.seeding import generators, initial_noise


def draw_noise(batch: PanoramaBatch, geometry: Geometry, device: torch.device) -> tuple[Tensor, Generators]:
    """Return the initial noise [B, C, H, W] on `device`, and the generators of later noise.

    The noise of the canvas is drawn first, unless it is given, and then that of one view if the method needs it.
    Raises UserError for given noise of another shape.
    """
    spec, method, inputs, count = geometry.spec, geometry.method, batch.inputs, len(batch.prompts)
    mixed = _blended(batch, method.config.noise.blend)
    seeded = generators(batch.seeds)

    def draw(channels: int, height: int, width: int) -> Tensor:
        if inputs is None:
            return mixed(initial_noise(seeded, channels, height, width))
        return mixed(inputs.draw((count, channels, height, width), device))

    drawn = partial(in_patches, draw, spec.channels, side=spec.noise_patch)
    shape = count, spec.channels, batch.height // spec.factor, batch.width // spec.factor
    if inputs is None or inputs.latents is None:
        noise = drawn(*shape[2:])
    elif inputs.latents.shape == shape:
        noise = mixed(inputs.latents.to(device, torch.float32))
    else:
        raise UserError(f"latents must be of shape {shape} for this size, got {tuple(inputs.latents.shape)}")
    if method.draws_view_noise:
        view = drawn(geometry.view_size, geometry.view_size)
        noise = align(noise, view, method.config.noise.align)
        noise = with_annex(noise, view) if method.config.merge.reference_steps else noise
    return noise.to(device), seeded if inputs is None else inputs.generator


def _blended(batch: PanoramaBatch, config: BlendConfig) -> Callable[[Tensor], Tensor]:
    """Return a function that blends the noise [B, C, H, W] that each panorama draws, to be called in that order.

    Second seeds draw the same shapes from generators that start with the batch, so with a share of 1 all initial noise
    is that of the second seed. Raises UserError if the batch does not determine the second seed or a share.
    """
    blends = batch.blends if batch.blends is not None else _of_one_prompt(batch, config)
    if not any(blends):
        return lambda noise_BCHW: noise_BCHW
    each = [one or NoiseBlend(0, 0.0) for one in blends]
    seconds = generators([one.seed for one in each])

    def mix(noise_BCHW: Tensor) -> Tensor:
        _, channels, height, width = noise_BCHW.shape
        other = initial_noise(seconds, channels, height, width).to(noise_BCHW)
        return blend(noise_BCHW, other, [one.share for one in each])

    return mix


def _of_one_prompt(batch: PanoramaBatch, config: BlendConfig) -> list[NoiseBlend | None]:
    """Return the blends of panoramas that are the samples of one prompt, as in a call from Python."""
    if not config.is_on:
        return []
    if config.seed is None and batch.inputs is not None:
        raise UserError("method.noise.blend.seed must be set in this call, which has generators in place of seeds")
    config.check_count(len(batch.prompts), "the number of panoramas")
    return [config.of_sample(index, batch.seeds[0]) for index in range(len(batch.prompts))]
