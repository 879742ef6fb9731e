"""Joint diffusion in one loop (MAD, Algorithm 1; MultiDiffusion is MAD with no steps).

One scheduler step on the canvas equals "step each view, then merge" for averages, weights and swaps alike, with every
sampler without clipping. It needs one scheduler state and draws ancestral noise once, so that merged cells keep its
variance (variance-corrected fusion).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from madgen.diffusion.operators import MergeOperator
from madgen.diffusion.regions import Composition
from madgen.diffusion.start import Start
from madgen.diffusion.steps import steps_of
from madgen.diffusion.syncdiffusion import Synchronizer
from madgen.diffusion.views import Layout, Views

Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"
"""Random numbers of a scheduler: of the whole batch, of each panorama, or PyTorch's default generator."""
OnStep: TypeAlias = "Callable[[int, Tensor, Tensor], Tensor]"
"""From the denoising step, the timestep and the latents after it to the latents to continue with."""


class Denoiser(Protocol):
    """Predict the noise of all views of the canvas; which attention layers merge may depend on `step`."""

    def predict(self, views_BVChw: Tensor, views: Views, step: int, timestep: Tensor) -> Tensor: ...


@torch.no_grad()
def joint_diffusion(
    noise_BCHW: Tensor,
    scheduler: Any,
    layout: Layout,
    denoiser: Denoiser,
    generators: Generators,
    *,
    merger: MergeOperator | None = None,
    composition: Composition | None = None,
    sync: Synchronizer | None = None,
    start: Start | None = None,
    on_step: OnStep = lambda step, timestep, latents_BCHW: latents_BCHW,
) -> Tensor:
    """Denoise a canvas: latents [B, C, H, W] float32 from noise of that shape; `scheduler` has its timesteps set.

    `merger` is the mean of the views by default; `composition` puts several prompts on a canvas (regions); `sync` may
    change the views before they are denoised (SyncDiffusion); `start` may be the latents of pictures; `on_step` is
    called after each evaluation and returns the latents to continue with.
    """
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    merger, composition = merger or MergeOperator(), composition or Composition()
    sync, start = sync or Synchronizer(), start or Start()
    first = start.first(scheduler)
    timesteps = scheduler.timesteps[first:]
    later = [*timesteps, None]
    latents = start.latents(noise_BCHW, scheduler, later[0])
    # Schedulers look timesteps up in tables on the CPU: one on a GPU would make every step wait for it.
    times = timesteps.cpu()
    for step, timestep, time, following in zip(steps_of(scheduler, first), timesteps, times, later[1:], strict=True):
        views = layout.at(step)
        views_RVChw = merger.split(composition.rows(latents, scheduler, timestep, step), views, step)
        if (pulled_RVChw := sync.pull(views_RVChw, views, scheduler, timestep, step)) is not None:
            latents = latents + composition.compose(merger.merge(pulled_RVChw - views_RVChw, views, step))
            views_RVChw = pulled_RVChw
        noise_views = denoiser.predict(scheduler.scale_model_input(views_RVChw, time), views, step, timestep)
        noise = composition.compose(merger.merge(noise_views, views, step))
        latents = merger.after_step(scheduler.step(noise, time, latents, **options).prev_sample, views, step)
        latents = start.keep(latents, noise_BCHW, scheduler, following)
        latents = on_step(step, time, latents)
    return latents
