"""Blend the noise of a batch with that of second seeds; see `method.noise.blend` of the job."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from madgen.config.schema import BlendConfig
from madgen.diffusion.noise import blend
from madgen.sampling.inputs import PanoramaBatch
from madgen.types import NoiseBlend
from madgen.utils.errors import UserError
from madgen.utils.seeding import generators, initial_noise


def blended(batch: PanoramaBatch, config: BlendConfig) -> Callable[[Tensor], Tensor]:
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
