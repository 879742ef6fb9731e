"""Prompts and seeds in, panoramas out. Knows nothing of datasets, of files or of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from madgen.backbones import Backbone, BackboneSpec, Merging, backbone_module
from madgen.config import Job
from madgen.errors import UserError
from madgen.joint.loop import joint_diffusion
from madgen.joint.views import Layout, Views, build_layout
from madgen.seeding import generators, initial_noise
from madgen.weights import resolve_dtype, resolve_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Geometry:
    """Checks sizes (pixels) against a backbone's shapes and lays out views for them."""

    def __init__(self, spec: BackboneSpec, layout: str, view_size: int | None, stride: int | None, mad_steps: int):
        self.spec, self.layout, self.mad_steps = spec, layout, mad_steps
        self.view_size = view_size or spec.view_size
        self.stride = stride or max(1, self.view_size // 4)
        if layout == "whole" and (view_size or stride):
            raise UserError("method.views.size and stride have no meaning with layout=whole; leave them null")

    def build(self, height: int, width: int) -> Layout:
        """The views of a canvas of `height` x `width` pixels; UserError names the nearest possible size."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % self.spec.factor:
                below = max(1, pixels // self.spec.factor) * self.spec.factor
                raise UserError(
                    f"{name}={pixels} is not a multiple of {self.spec.factor} px (a latent cell); "
                    f"the nearest are {below} and {below + self.spec.factor}"
                )
            self._check_extent(name, pixels)
        factor = self.spec.factor
        layout = build_layout(self.layout, height // factor, width // factor, self.view_size, self.stride)
        self._check_merging(layout.at(0))
        return layout

    def _check_extent(self, name: str, pixels: int) -> None:
        """The errors of `build_layout`, said in the user's pixels."""
        factor, size, stride = self.spec.factor, self.view_size, self.stride
        if self.layout == "whole":
            return
        if not 0 < stride <= size:
            raise UserError(f"method.views: need 0 < stride <= size, got stride {stride} and size {size} latent cells")
        if pixels < size * factor:
            raise UserError(
                f"{name}={pixels} px is smaller than a view of {size} latent cells = {size * factor} px; "
                f"take {name} >= {size * factor}"
            )
        rest = (pixels // factor - size) % stride
        if rest:
            below = pixels - rest * factor
            raise UserError(
                f"{name}={pixels} px cannot be covered by views of {size} latent cells with stride {stride}; "
                f"the nearest are {below} and {below + stride * factor} px"
            )

    def _check_merging(self, views: Views) -> None:
        if self.layout != "whole" and self.mad_steps and not views.divisible(self.spec.coarsest):
            raise UserError(
                f"method.mad needs views of a size and a stride that are multiples of {self.spec.coarsest} latent "
                f"cells (the UNet's lowest level), got size {self.view_size} and stride {self.stride}"
            )


class PanoramaSampler:
    """Joint diffusion with one backbone and one method.

    >>> sampler = PanoramaSampler.from_pretrained("demo", mad_steps=8)            # doctest: +SKIP
    >>> images = sampler.sample(["dunes at night"], height=128, width=768, seeds=[7])  # doctest: +SKIP
    """

    def __init__(self, backbone: Backbone, geometry: Geometry, merging: Merging, scheduler: str | None = None):
        self.backbone, self.geometry, self.merging, self.scheduler = backbone, geometry, merging, scheduler

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        *,
        name: str = "sd",
        revision: str | None = None,
        variant: str | None = None,
        layout: str = "overlapping",
        view_size: int | None = None,
        stride: int | None = None,
        mad_steps: int = 15,
        mad_blocks: Sequence[str] = ("down", "mid", "up"),
        cross_attention: str = "scheduled",
        scheduler: str | None = None,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
    ) -> PanoramaSampler:
        """Loads a diffusers folder, a hub id or `demo`; sizes are latent cells, null ones the backbone's own."""
        folder, device = resolve_pretrained(pretrained), torch.device(device)
        backbone = backbone_module(name).load(
            folder, revision=revision, variant=variant, dtype=DTYPES[resolve_dtype(dtype, device.type)], device=device
        )
        geometry = Geometry(backbone.spec, layout, view_size, stride, mad_steps)
        merging = Merging(mad_steps, tuple(mad_blocks), cross_attention)
        backbone.merged_layers(merging)
        if scheduler is not None:
            backbone.new_scheduler(scheduler, 1)
        return cls(backbone, geometry, merging, scheduler)

    @classmethod
    def from_job(cls, job: Job, device: str | torch.device = "cpu") -> PanoramaSampler:
        """The sampler that a job file asks for."""
        return cls.from_pretrained(
            job.backbone.pretrained,
            name=job.backbone.name,
            revision=job.backbone.revision,
            variant=job.backbone.variant,
            layout=job.method.views.layout,
            view_size=job.method.views.size,
            stride=job.method.views.stride,
            mad_steps=job.method.mad.steps,
            mad_blocks=job.method.mad.blocks,
            cross_attention=job.method.mad.cross_attention,
            scheduler=job.sampling.scheduler,
            dtype=job.backbone.dtype,
            device=device,
        )

    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        height: int,
        width: int,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        seeds: Sequence[int],
        loop: bool = False,
        output: Literal["image", "latent"] = "image",
        on_step: Callable[[int], None] = lambda step: None,
    ) -> np.ndarray | Tensor:
        """Panoramas of one size, one for each prompt.

        Returns uint8 [B, height, width, 3], or with `output="latent"` float32 latents [B, C, height/f, width/f].
        Each prompt draws from its own `torch.Generator("cpu").manual_seed(seed)`: first the initial noise, then what
        the scheduler asks for. Raises UserError for sizes and settings that are not possible.
        """
        negatives = list(negative_prompts) if negative_prompts is not None else [""] * len(prompts)
        self._check(prompts, negatives, seeds, guidance_scale, loop, output)
        layout = self.geometry.build(height, width)
        spec, backbone = self.backbone.spec, self.backbone
        conditioning = backbone.encode_prompts(list(prompts), negatives, guidance_scale)
        scheduler = backbone.new_scheduler(self.scheduler, num_inference_steps)
        draws = generators(list(seeds))
        noise = initial_noise(draws, spec.channels, height // spec.factor, width // spec.factor)
        latents = joint_diffusion(
            noise.to(scheduler.timesteps.device),
            scheduler,
            layout,
            _Conditioned(backbone, self.merging, conditioning),
            draws,
            on_step,
        )
        if output == "latent":
            return latents
        return self.decode(latents)

    def decode(self, latents_BCHW: Tensor) -> np.ndarray:
        """uint8 pictures [B, height, width, 3] of latents that `sample` gave."""
        return to_uint8(self.backbone.decode(latents_BCHW))

    def _check(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float,
        loop: bool,
        output: str,
    ) -> None:
        if isinstance(prompts, str) or not len(prompts) == len(negatives) == len(seeds) or not prompts:
            raise UserError(
                f"need lists of as many prompts as negative prompts and seeds, "
                f"got {len(prompts)}, {len(negatives)}, {len(seeds)}"
            )
        if output not in ("image", "latent"):
            raise UserError(f"output must be 'image' or 'latent', got {output!r}")
        if loop:
            raise UserError("loop=True is not supported yet")
        check_negative_prompts(self.backbone.spec, negatives, guidance_scale)


def check_negative_prompts(spec: BackboneSpec, negatives: Sequence[str], guidance_scale: float) -> None:
    """A negative prompt that could have no effect is refused, not ignored."""
    if any(negatives) and (spec.guidance_embedded or guidance_scale <= 1):
        reason = "embeds its guidance" if spec.guidance_embedded else f"has guidance_scale={guidance_scale} <= 1"
        raise UserError(f"a negative prompt has no effect: the backbone {reason}; leave negative_prompt empty")


class _Conditioned:
    """A backbone bound to one batch's prompts: the loop's `Denoiser`."""

    def __init__(self, backbone: Backbone, merging: Merging, conditioning: Any):
        self.backbone, self.merging, self.conditioning = backbone, merging, conditioning

    def merged_attention(self, views: Views, step: int) -> Any:
        return self.backbone.merged_attention(views, step, self.merging, self.conditioning)

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor) -> Tensor:
        return self.backbone.predict_noise(views_BVChw, timestep, self.conditioning)


def to_uint8(pixels_B3HW: Tensor) -> np.ndarray:
    """Pixels in 0..1 to uint8 [B, H, W, 3], rounded as diffusers does."""
    return (pixels_B3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
