"""Joint diffusion in one loop (MAD, Algorithm 1; MultiDiffusion is MAD with no steps).

One scheduler step on the canvas equals "step each view, then average" for every sampler without clipping, needs one
scheduler state and draws ancestral noise once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from madgen.joint.merge import merge, split
from madgen.joint.views import Layout, Views


class Denoiser(Protocol):
    """What the loop needs of a backbone; `step` says which attention layers merge."""

    def merged_attention(self, views: Views, step: int) -> AbstractContextManager[None]: ...

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor: ...


@torch.no_grad()
def joint_diffusion(
    noise_BCHW: Tensor,
    scheduler: Any,
    layout: Layout,
    denoiser: Denoiser,
    generators: list[torch.Generator],
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Latents [B, C, H, W] float32 from noise of that shape; `scheduler` has its timesteps set already."""
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = noise_BCHW * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        views = layout.at(step)
        scaled = scheduler.scale_model_input(latents, timestep)
        with denoiser.merged_attention(views, step):
            noise_views = denoiser.predict_noise(split(scaled, views), timestep)
        latents = scheduler.step(merge(noise_views, views), timestep, latents, **options).prev_sample
        on_step(step)
    return latents
