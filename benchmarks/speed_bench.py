"""What a run of the speed benchmark measures: shapes, sizes, and the models of them."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from speed_contenders import Run, Timing, alternate, madgen, plain_attention, reference_folder, sampler_of
from speed_models import SHAPES, build_backbone, build_pipeline

from madgen import PanoramaSampler

Row = dict[str, Any]
PAPER_STEPS, TAU = 50, 15


@dataclass
class Bench:
    """Shapes and sizes of a run, and the models of it; they are built when first asked for."""

    device: torch.device
    shape: str
    xl_shape: str
    height: int
    width: int
    widths: tuple[int, ...]
    xl_size: tuple[int, int]
    rounds: int
    steps: int
    dtype: torch.dtype
    foreign_dtype: torch.dtype
    """Of the released code: float16 on a GPU, its own choice under autocast; it knows no bfloat16."""
    backend: str = "inductor"
    panoramas: int = 4
    share: float = 1.0
    """Of the fast preset's steps."""
    known: dict[str, Row] = field(default_factory=dict)

    @cached_property
    def pipeline(self) -> Any:
        """Ours."""
        return build_pipeline(SHAPES[self.shape], self.dtype, self.device)

    @cached_property
    def backbone(self) -> Any:
        """On the weights of `pipeline`."""
        if self.shape == "demo":
            return PanoramaSampler.from_pretrained("demo", dtype="float32", device=self.device).backbone
        return build_backbone(self.pipeline, SHAPES[self.shape], self.dtype, self.device)

    def copied(self, dtype: torch.dtype) -> Any:
        """A pipeline with the same weights in modules of their own, in the layout that diffusers leaves them in."""
        ours = self.pipeline
        parts = dict(ours.components)
        for name in ("unet", "vae", "text_encoder"):
            parts[name] = copy.deepcopy(parts[name]).to(dtype=dtype, memory_format=torch.contiguous_format).eval()
            parts[name].requires_grad_(False)
            for module in parts[name].modules():
                vars(module).pop("forward", None)  # diffusers' own, without what ours puts in its place
        plain_attention(parts["unet"])
        parts["scheduler"] = copy.deepcopy(ours.scheduler)
        return type(ours)(**parts, requires_safety_checker=False)

    @cached_property
    def foreign(self) -> Any:
        """For the released code."""
        return self.copied(self.foreign_dtype)

    @cached_property
    def foreign_same(self) -> Any:
        """For diffusers: our dtype."""
        return self.foreign if self.foreign_dtype == self.dtype else self.copied(self.dtype)

    def forget(self, *names: str) -> None:
        """Frees models."""
        for name in names:
            self.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def released(self) -> bool:
        """Whether the released code is at hand and can run this: its views are of 64 cells."""
        return reference_folder() is not None and self.shape != "demo"

    def views(self, stride: int | None = None, width: int | None = None) -> int:
        """Of a panorama."""
        return sampler_of(self.backbone, 0, stride).geometry.build(self.height, width or self.width).at(0).count

    def ours(self, merged: float, compiled: bool = False, **method: Any) -> Run:
        """madgen at this size."""
        width = method.pop("width", self.width)
        return madgen(self.backbone, self.height, width, merged, compiled, **method)

    def measure(self, contenders: dict[str, Run], steps: int | None = None, rounds: int | None = None) -> Row:
        """Alternates them."""
        return as_row(alternate(contenders, steps or self.steps, rounds or self.rounds))


def as_row(timings: dict[str, Timing]) -> Row:
    """For the log."""
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return {
        "seconds_a_step": seconds,
        "median": {name: timing.median for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak for name, timing in timings.items() if timing.peak},
    }
