"""A backbone bound to the prompts of a batch: the `Denoiser` of `madgen.diffusion.denoise`."""

from __future__ import annotations

from collections.abc import Container
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from madgen.backbones import Backbone, Merging
from madgen.diffusion.denoise import Denoiser
from madgen.diffusion.views import Views


@dataclass(frozen=True)
class Conditioned:
    """`conditioning` is what the backbone made of the prompts; `chunk_views` see `PanoramaSampler.sample`."""

    backbone: Backbone
    merging: Merging
    conditioning: Any
    chunk_views: int | None = None

    def merged_attention(self, views: Views, step: int) -> AbstractContextManager[None]:
        return self.backbone.merged_attention(views, step, self.merging, self.conditioning)

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor:
        return self.backbone.predict_noise(views_BVChw, timestep, self.conditioning, self.chunk_views)


class BySteps:
    """`one` denoiser in some steps, `other` in the rest."""

    def __init__(self, one: Denoiser, other: Denoiser, steps: Container[int]):
        self.one, self.other, self.steps = one, other, steps
        self.current = other

    def merged_attention(self, views: Views, step: int) -> AbstractContextManager[None]:
        self.current = self.one if step in self.steps else self.other
        return self.current.merged_attention(views, step)

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor:
        return self.current.predict_noise(views_BVChw, timestep)
