"""Joint diffusion in one loop (MAD, Algorithm 1; MultiDiffusion is MAD with no steps).

One scheduler step on the canvas equals "step each view, then average" for every sampler without clipping, needs one
scheduler state and draws ancestral noise once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from madgen.diffusion.merge import merge, split
from madgen.diffusion.regions import Composition, OnePrompt
from madgen.diffusion.syncdiffusion import NoSync
from madgen.diffusion.views import Layout, Views


class Denoiser(Protocol):
    """Predict the noise of all views of the canvas; which attention layers merge may depend on `step`."""

    def predict(self, views_BVChw: Tensor, views: Views, step: int, timestep: Tensor) -> Tensor: ...


class Synchronizer(Protocol):
    """May change the views before they are denoised; None: leaves them as they are."""

    def pull(self, views_BVChw: Tensor, views: Views, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None: ...


@torch.no_grad()
def joint_diffusion(
    noise_BCHW: Tensor,
    scheduler: Any,
    layout: Layout,
    denoiser: Denoiser,
    generators: list[torch.Generator],
    *,
    composition: Composition | None = None,
    sync: Synchronizer | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Latents [B, C, H, W] float32 from noise of that shape; `scheduler` has its timesteps set already.

    `composition` puts several prompts on a canvas (regions); `sync` may change the views before they are denoised
    (SyncDiffusion).
    """
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    composition, sync = composition or OnePrompt(), sync or NoSync()
    latents = noise_BCHW * scheduler.init_noise_sigma
    # Schedulers look timesteps up in tables on the CPU: one on a GPU would make every step wait for it.
    times = scheduler.timesteps.cpu()
    for step, timestep, time in zip(steps_of(scheduler), scheduler.timesteps, times, strict=True):
        views = layout.at(step)
        views_RVChw = split(composition.rows(latents, scheduler, timestep, step), views)
        if (pulled_RVChw := sync.pull(views_RVChw, views, scheduler, timestep, step)) is not None:
            latents = latents + composition.compose(merge(pulled_RVChw - views_RVChw, views))
            views_RVChw = pulled_RVChw
        noise_views = denoiser.predict(scheduler.scale_model_input(views_RVChw, time), views, step, timestep)
        noise = composition.compose(merge(noise_views, views))
        latents = scheduler.step(noise, time, latents, **options).prev_sample
        on_step(step)
    return latents


def steps_of(scheduler: Any) -> list[int]:
    """The step that each evaluation belongs to: schedulers of second order, such as Heun's, take two a step, and PNDM
    evaluates at some timesteps more than once."""
    if scheduler.order > 1:
        return [evaluation // scheduler.order for evaluation in range(len(scheduler.timesteps))]
    times = scheduler.timesteps.tolist()
    seen: dict[float, int] = {}
    return [seen.setdefault(time, len(seen)) for time in times]
