"""Reference-guided swap (SaFa, Sec. 3.3): one more view, on an annex of the canvas, that all views take rows from.

The annex lies to the right of the canvas and no other view covers it. So the reference view is denoised by itself, and
one scheduler steps both.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from madgen.diffusion.denoise import OnStep
from madgen.diffusion.operators import MergeOperator
from madgen.diffusion.views import Axis, Views

PROBED_STEPS = 6
"""Denoising steps with which schedulers are probed."""


def with_annex(noise_BCHW: Tensor, reference_BChw: Tensor) -> Tensor:
    """Put the noise of the reference view to the right of the canvas's: [B, C, H, W + w]; below it are zeros."""
    annex = noise_BCHW.new_zeros(*noise_BCHW.shape[:-1], reference_BChw.shape[-1])
    annex[..., : reference_BChw.shape[-2], :] = reference_BChw
    return torch.cat([noise_BCHW, annex], dim=-1)


def without_annex(on_step: OnStep, width: int) -> OnStep:
    """Return a callback that passes on canvases of `width` cells, without an annex."""

    def on_canvas(step: int, timestep: Tensor, latents_BCHW: Tensor) -> Tensor:
        if latents_BCHW.shape[-1] == width:
            return on_step(step, timestep, latents_BCHW)
        canvas = on_step(step, timestep, latents_BCHW[..., :width])
        return torch.cat([canvas, latents_BCHW[..., width:]], dim=-1)

    return on_canvas


@dataclass(frozen=True)
class ReferenceSwap(MergeOperator):
    """In the first `reference_steps` steps every other row of a view's middle is the reference view's.

    The middle is what only one view covers. Rows are counted in the view: 1, 3, 5 and so on are replaced after the
    scheduler step. Latents have an annex, see `with_annex`; it is not denoised after these steps.
    """

    reference_steps: int = 0

    def split(self, latents_BCHW: Tensor, views: Views, step: int) -> Tensor:
        """Return the views to denoise [B, V, C, h, w], in the first steps with the reference view as the last one."""
        canvas = latents_BCHW[..., : views.columns.extent]
        cut = super().split(canvas, views, step)
        if step >= self.reference_steps:
            return cut
        reference = latents_BCHW[:, None, :, : views.rows.size, views.columns.extent :]
        return torch.cat([cut, reference], dim=1)

    def merge(self, views_BVChw: Tensor, views: Views, step: int) -> Tensor:
        """Merge the views to a canvas with its annex [B, C, H, W + w]."""
        canvas = super().merge(views_BVChw[:, : views.count], views, step)
        reference = views_BVChw[:, -1] if step < self.reference_steps else torch.zeros_like(views_BVChw[:, 0])
        return with_annex(canvas, reference)

    def after_step(self, latents_BCHW: Tensor, views: Views, step: int) -> Tensor:
        """Replace the rows of the views' middles."""
        if step >= self.reference_steps:
            return latents_BCHW
        sources = _sources(views, latents_BCHW.device)
        return latents_BCHW.flatten(2).index_select(2, sources).view_as(latents_BCHW)


def check_history(scheduler: Any) -> None:
    """Raise ValueError if a step of the scheduler depends on earlier steps: their latents had other rows.

    The last steps of many schedulers are of lower order, so at least `PROBED_STEPS` are set.
    """
    if len(scheduler.timesteps) < PROBED_STEPS:
        scheduler = _with_more_steps(scheduler)
    for last in range(1, len(scheduler.timesteps[:3])):
        if not torch.equal(_stepped(scheduler, last, 1.0), _stepped(scheduler, last, -3.0)):
            raise ValueError(f"{type(scheduler).__name__} uses the predictions of earlier steps")


def _with_more_steps(scheduler: Any) -> Any:
    more = copy.deepcopy(scheduler)
    try:
        more.set_timesteps(PROBED_STEPS, device=scheduler.timesteps.device)
    except ValueError:  # dynamic shifting depends on the size of the image
        return scheduler
    return more


def _stepped(scheduler: Any, last: int, past: float) -> Tensor:
    """Return the result of step `last` from fixed latents, after earlier steps from `past` times these."""
    scheduler = copy.deepcopy(scheduler)
    latents = torch.linspace(-1, 1, 4, dtype=torch.float32, device=scheduler.timesteps.device).view(1, 1, 2, 2)
    result = latents
    for step, time in enumerate(scheduler.timesteps[: last + 1].cpu()):
        cells = latents if step == last else past * latents
        generator = torch.Generator("cpu").manual_seed(step)
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        scheduler.scale_model_input(cells, time)
        result = scheduler.step(cells / 2, time, cells, **options).prev_sample
    return result


@lru_cache(maxsize=64)
def _sources(views: Views, device: torch.device) -> Tensor:
    """Return for every cell of the canvas and its annex, row by row, the cell that it takes its value from."""
    rows, columns = views.rows, views.columns
    extent, width = rows.extent, columns.extent + columns.size
    sources = torch.arange(extent * width).view(extent, width)
    down, across = _alone(rows), _alone(columns)
    for row, in_view in down.items():
        if in_view % 2:
            for column, offset in across.items():
                sources[row, column] = in_view * width + columns.extent + offset
    return sources.flatten().to(device)


def _alone(axis: Axis) -> dict[int, int]:
    """Return the cells that a single view covers, and where in the view they lie."""
    return {cell: positions[0] % axis.size for cell, positions in enumerate(axis.covers) if len(positions) == 1}
