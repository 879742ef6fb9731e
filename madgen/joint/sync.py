"""SyncDiffusion (Lee et al., NeurIPS 2023): before a joint step, each view is pulled towards the middle one's look."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class NoisePredictor(Protocol):
    """Differentiable; see `madgen.backbones.Backbone`."""

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SyncSchedule:
    """When and how strongly: `weight * decay ** step`, in the first `steps` steps, at each `every`-th of them."""

    weight: float
    decay: float
    steps: int
    every: int

    def at(self, step: int) -> float:
        """The gradient's weight at a step; 0 where there is none."""
        due = step < self.steps and (step + 1) % self.every == 0
        return self.weight * self.decay**step if due else 0.0


class NoSync:
    """Leaves the views alone."""

    def pull(self, views_BVChw: Tensor, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None:
        return None


class SyncGuidance:
    """Gradient descent on each view's latent, on the perceptual distance of its foreseen picture to the anchor's.

    `decode` gives pixels in 0..1 [B, 3, h, w] of clean latents; `distance` compares two such batches, [B]. Both must
    be differentiable. The anchor is the middle view; views are processed one by one, which bounds the memory.
    """

    def __init__(
        self,
        schedule: SyncSchedule,
        denoiser: NoisePredictor,
        decode: Callable[[Tensor], Tensor],
        distance: Callable[[Tensor, Tensor], Tensor],
    ):
        self.schedule, self.denoiser, self.decode, self.distance = schedule, denoiser, decode, distance

    def pull(self, views_BVChw: Tensor, scheduler: Any, timestep: Tensor, step: int) -> Tensor | None:
        """The views after one step of gradient descent; None if none is due at `step`."""
        weight, count = self.schedule.at(step), views_BVChw.shape[1]
        if weight == 0 or count == 1:
            return None
        with torch.no_grad():
            anchor = self._foreseen(views_BVChw[:, count // 2], scheduler, timestep)
        pulled = views_BVChw.clone()
        for index in range(count):
            if index != count // 2:
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
