"""SyncDiffusion (Lee et al., NeurIPS 2023): before a joint step, each view is pulled towards the middle one's look."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from madgen.diffusion.sync_schedule import SyncSchedule
from madgen.diffusion.views import Views


class NoisePredictor(Protocol):
    """Differentiable; see `madgen.backbones.Backbone`."""

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor: ...


class NoSync:
    """Leaves the views alone."""

    def pull(self, views_BVChw: Tensor, views: Views, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None:
        return None


class SyncGuidance:
    """Gradient descent on each view's latent, on the perceptual distance of its foreseen picture to the anchor's.

    `decode` gives pixels in 0..1 [B, 3, h, w] of clean latents; `distance` compares two such batches, [B]. Both must
    be differentiable. The anchor is the middle view of the middle row of views; views are processed one by one, which
    bounds the memory.
    """

    def __init__(
        self,
        schedule: SyncSchedule,
        denoiser: NoisePredictor,
        decode: Callable[[Tensor], Tensor],
        distance: Callable[[Tensor, Tensor], Tensor],
    ):
        self.schedule, self.denoiser, self.decode, self.distance = schedule, denoiser, decode, distance

    def pull(self, views_BVChw: Tensor, views: Views, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None:
        """The views after one step of gradient descent; None if none is due at `step`."""
        weight = self.schedule.at(step)
        if weight == 0 or views.count == 1:
            return None
        middle = views.middle
        with torch.no_grad():
            anchor = self._foreseen(views_BVChw[:, middle], scheduler, timestep)
        pulled = views_BVChw.clone()
        for index in range(views.count):
            if index != middle:
                gradient = self.gradient(views_BVChw[:, index], anchor, scheduler, timestep)
                pulled[:, index] -= weight * gradient
        return pulled

    def gradient(self, view_BChw: Tensor, anchor_B3hw: Tensor, scheduler: Any, timestep: Tensor) -> Tensor:
        """Of the distance with respect to the view's latent, through autoencoder and denoiser, [B, C, h, w]."""
        with torch.enable_grad():
            view = view_BChw.detach().requires_grad_()
            distance = self.distance(self._foreseen(view, scheduler, timestep), anchor_B3hw)
            (gradient,) = torch.autograd.grad(distance.sum(), view)
        return gradient

    def _foreseen(self, view_BChw: Tensor, scheduler: Any, timestep: Tensor) -> Tensor:
        """Pixels of the clean picture that the denoiser foresees."""
        scaled = copy.deepcopy(scheduler).scale_model_input(view_BChw, timestep)
        noise = self.denoiser.predict_noise(scaled[:, None], timestep)[:, 0]
        return self.decode(foreseen_latents(scheduler, noise, timestep, view_BChw))


def foreseen_latents(scheduler: Any, noise_BChw: Tensor, timestep: Tensor, latents_BChw: Tensor) -> Tensor:
    """Clean latents that `scheduler` foresees, without moving it on. ValueError if it does not tell them."""
    probe = copy.deepcopy(scheduler)  # a step changes the state of multi-step schedulers
    probe.scale_model_input(latents_BChw, timestep)
    output = probe.step(noise_BChw, timestep, latents_BChw)
    clean = getattr(output, "pred_original_sample", None)
    if clean is None:
        clean = getattr(output, "denoised", None)
    if clean is None:
        raise ValueError(f"{type(scheduler).__name__} does not tell the clean picture that it foresees")
    return clean


def check_foresight(scheduler: Any, latents_1CHW: Tensor) -> None:
    """ValueError if SyncDiffusion cannot work with a scheduler, told by two evaluations on zeros [1, C, 1, 3].

    Those that keep a history of the canvas, such as Heun's, cannot be asked about a view of another size.
    """
    canvas = copy.deepcopy(scheduler)
    for timestep in canvas.timesteps[:2]:
        view = latents_1CHW[..., :2]
        try:
            foreseen_latents(canvas, view, timestep, view)
        except RuntimeError as error:
            raise ValueError(f"{type(scheduler).__name__} cannot be asked about one view") from error
        canvas.scale_model_input(latents_1CHW, timestep)
        canvas.step(latents_1CHW, timestep, latents_1CHW)
