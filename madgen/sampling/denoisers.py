"""Backbones bound to the prompts of a batch: the `Denoiser` of `madgen.diffusion.denoise`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor

from madgen.backbones import Backbone, Conditioning
from madgen.diffusion.attention import JointStep, Merging
from madgen.diffusion.denoise import Denoiser
from madgen.diffusion.views import Views


@dataclass(frozen=True)
class ConditionedDenoiser:
    """A backbone with the encoded prompts of a batch."""

    backbone: Backbone
    merging: Merging
    conditioning: Conditioning
    chunk_views: int | None = None
    """See `PanoramaSampler.sample`."""

    def predict(self, views_BVChw: Tensor, views: Views, step: int, timestep: Tensor) -> Tensor:
        """Predict the noise of all views together, attention merged as `merging` schedules it."""
        joint = JointStep(views, step, self.merging)
        return self.backbone.predict_noise(views_BVChw, timestep, self.conditioning, joint, self.chunk_views)

    def predict_separately(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor:
        """Predict the noise of each view on its own; gradients flow."""
        return self.backbone.predict_noise(views_BVChw, timestep, self.conditioning, None, self.chunk_views)


@dataclass(frozen=True)
class ScheduledDenoiser:
    """`inside` in some denoising steps, `outside` in the others."""

    inside: Denoiser
    outside: Denoiser
    steps: Container[int]

    def predict(self, views_BVChw: Tensor, views: Views, step: int, timestep: Tensor) -> Tensor:
        """Predict with the denoiser of this step."""
        denoiser = self.inside if step in self.steps else self.outside
        return denoiser.predict(views_BVChw, views, step, timestep)
