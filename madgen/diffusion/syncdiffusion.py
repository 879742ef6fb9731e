"""SyncDiffusion (Lee et al., NeurIPS 2023): before a joint step, move each view towards the style of the middle one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madgen.diffusion.views import Views


class Synchronizer:
    """Change the views before they are denoised: here they stay as they are."""

    def pull(self, views_BVChw: Tensor, views: Views, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None:
        """Return the changed views; None: no change."""
        return None


class SyncGuidance(Synchronizer):
    """Gradient descent on each view's latents, on the perceptual distance between its x0 prediction and the anchor's.

    `weight_at` returns the weight of the gradient at a step, 0 for none. `predict` returns the noise of views, `decode`
    pixels in 0..1 [B, 3, h, w] of clean latents, and `distance` compares two such batches, [B]: all differentiable. The
    anchor is the middle view of the middle row; views are processed one by one to bound the memory.
    """

    def __init__(
        self,
        weight_at: Callable[[int], float],
        predict: Callable[[Tensor, Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        distance: Callable[[Tensor, Tensor], Tensor],
    ):
        self.weight_at, self.predict, self.decode, self.distance = weight_at, predict, decode, distance

    def pull(self, views_BVChw: Tensor, views: Views, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None:
        """Return the views after one step of gradient descent, None if there is none at `step`."""
        weight = self.weight_at(step)
        if weight == 0 or views.count == 1:
            return None
        middle = views.middle
        with torch.no_grad():
            anchor = self._predict_image(views_BVChw[:, middle], scheduler, timestep)
        pulled = views_BVChw.clone()
        for index in range(views.count):
            if index != middle:
                gradient = self.gradient(views_BVChw[:, index], anchor, scheduler, timestep)
                pulled[:, index] -= weight * gradient
        return pulled

    def gradient(self, view_BChw: Tensor, anchor_B3hw: Tensor, scheduler: Any, timestep: Tensor) -> Tensor:
        """Return the gradient of the distance through decoder and denoiser, [B, C, h, w]."""
        with torch.enable_grad():
            view = view_BChw.detach().requires_grad_()
            distance = self.distance(self._predict_image(view, scheduler, timestep), anchor_B3hw)
            (gradient,) = torch.autograd.grad(distance.sum(), view)
        return gradient

    def _predict_image(self, view_BChw: Tensor, scheduler: Any, timestep: Tensor) -> Tensor:
        """Predict the pixels of the clean image."""
        scaled = copy.deepcopy(scheduler).scale_model_input(view_BChw, timestep)
        noise = self.predict(scaled[:, None], timestep)[:, 0]
        return self.decode(predict_x0(scheduler, noise, timestep, view_BChw))


def predict_x0(scheduler: Any, noise_BChw: Tensor, timestep: Tensor, latents_BChw: Tensor) -> Tensor:
    """Return the scheduler's x0 prediction without changing its state; ValueError if it does not expose one."""
    probe = copy.deepcopy(scheduler)  # a step changes the state of multi-step schedulers
    probe.scale_model_input(latents_BChw, timestep)
    output = probe.step(noise_BChw, timestep, latents_BChw)
    clean = getattr(output, "pred_original_sample", None)
    if clean is None:
        clean = getattr(output, "denoised", None)
    if clean is None:
        raise ValueError(f"{type(scheduler).__name__} does not expose the predicted x0 (`pred_original_sample`)")
    return clean


def check_x0_prediction(scheduler: Any, latents_1CHW: Tensor) -> None:
    """Raise ValueError if SyncDiffusion does not support a scheduler, tested by two steps on zeros [1, C, 1, 3].

    Schedulers that keep a history of the canvas, such as Heun's, cannot step a view of another size.
    """
    canvas = copy.deepcopy(scheduler)
    for timestep in canvas.timesteps[:2]:
        view = latents_1CHW[..., :2]
        try:
            predict_x0(canvas, view, timestep, view)
        except RuntimeError as error:
            raise ValueError(f"{type(scheduler).__name__} cannot step a single view") from error
        canvas.scale_model_input(latents_1CHW, timestep)
        canvas.step(latents_1CHW, timestep, latents_1CHW)
