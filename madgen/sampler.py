"""Prompts and seeds in, panoramas out. Knows nothing of datasets, of files or of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from madgen.backbones import Backbone, BackboneSpec, Lora, Merging, as_lora, backbone_module
from madgen.config import Job
from madgen.errors import UserError
from madgen.joint.loop import joint_diffusion
from madgen.joint.views import Layout, Views, build_layout
from madgen.seeding import generators, initial_noise
from madgen.weights import resolve_dtype, resolve_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE_AT_MOST = 2**22
"""Pixels that `decode: auto` decodes in one pass; of the size alone, so that the bytes do not depend on the memory."""


class Geometry:
    """Checks sizes (pixels) against a backbone's shapes and lays out views for them."""

    def __init__(self, spec: BackboneSpec, layout: str, view_size: int | None, stride: int | None, merges: bool):
        self.spec, self.layout, self.merges = spec, layout, merges
        self.view_size = spec.view_size if view_size is None else view_size
        self.stride = max(1, self.view_size // 4) if stride is None else stride
        if layout == "whole" and (view_size or stride):
            raise UserError("method.views.size and stride have no meaning with layout=whole; leave them null")

    def build(self, height: int, width: int, loop: bool = False) -> Layout:
        """The views of a canvas of `height` x `width` pixels; UserError names the nearest possible size."""
        if self.layout == "whole" and loop:
            raise UserError("sampling.loop=true needs views that wrap around: layout overlapping or shifted, not whole")
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % self.spec.factor:
                below = max(1, pixels // self.spec.factor) * self.spec.factor
                raise UserError(
                    f"{name}={pixels} is not a multiple of {self.spec.factor} px (a latent cell); "
                    f"the nearest are {below} and {below + self.spec.factor}"
                )
            self._check_extent(name, pixels, loop and name == "width")
        factor = self.spec.factor
        layout = build_layout(self.layout, height // factor, width // factor, self.view_size, self.stride, loop)
        for step in range(self.view_size if self.layout == "shifted" else 1):
            self._check_merging(layout.at(step))
        return layout

    def _check_extent(self, name: str, pixels: int, loop: bool) -> None:
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
        rest = (pixels // factor - (0 if loop else size)) % stride
        if rest:
            below = pixels - rest * factor
            what = "a loop of views" if loop else "views"
            raise UserError(
                f"{name}={pixels} px cannot be covered by {what} of {size} latent cells with stride {stride}; "
                f"the nearest are {below} and {below + stride * factor} px"
            )

    def _check_merging(self, views: Views) -> None:
        if views.count > 1 and self.merges and not views.divisible(self.spec.coarsest):
            raise UserError(
                f"method.mad needs views of a size and a stride that are multiples of {self.spec.coarsest} latent "
                f"cells (the UNet's lowest level), got size {self.view_size} and stride {self.stride}"
            )


class PanoramaSampler:
    """Joint diffusion with one backbone and one method.

    >>> sampler = PanoramaSampler.from_pretrained("demo", mad_steps=8)            # doctest: +SKIP
    >>> images = sampler.sample(["dunes at night"], height=128, width=768, seeds=[7])  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: Backbone,
        geometry: Geometry,
        merging: Merging,
        scheduler: str | None = None,
        original_inference_steps: int | None = None,
    ):
        self.backbone, self.geometry, self.merging, self.scheduler = backbone, geometry, merging, scheduler
        self.original_inference_steps = original_inference_steps

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        *,
        name: str = "sd",
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        loras: Sequence[Lora | Mapping[str, Any]] = (),
        layout: str = "overlapping",
        view_size: int | None = None,
        stride: int | None = None,
        mad_steps: int = 15,
        mad_blocks: Sequence[str] = ("down", "mid", "up"),
        cross_attention: str = "scheduled",
        scheduler: str | None = None,
        original_inference_steps: int | None = None,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
    ) -> PanoramaSampler:
        """Loads a diffusers folder, a hub id, a single file or `demo`, and fuses `loras` (weights, scale) into it.

        Sizes are latent cells, None ones the backbone's own. `config`: see `backbone.config` of the job.
        """
        folder, device = resolve_pretrained(pretrained), torch.device(device)
        if cross_attention not in ("scheduled", "always"):
            raise UserError(f"cross_attention must be scheduled or always, got {cross_attention!r}")
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
        backbone = backbone_module(name).load(
            folder,
            revision=revision,
            variant=variant,
            config=config and resolve_pretrained(config),
            loras=[as_lora(lora) for lora in loras],
            dtype=DTYPES[resolve_dtype(dtype, device.type)],
            device=device,
        )
        merges = mad_steps > 0 or cross_attention == "always"
        geometry = Geometry(backbone.spec, layout, view_size, stride, merges)
        merging = Merging(mad_steps, tuple(mad_blocks), cross_attention)
        backbone.merged_layers(merging)
        return cls(backbone, geometry, merging, scheduler, original_inference_steps)

    @classmethod
    def from_job(cls, job: Job, device: str | torch.device = "cpu") -> PanoramaSampler:
        """The sampler that a job file asks for."""
        return cls.from_pretrained(
            job.backbone.pretrained,
            name=job.backbone.name,
            revision=job.backbone.revision,
            variant=job.backbone.variant,
            config=job.backbone.config,
            loras=[Lora(lora.weights, lora.scale) for lora in job.backbone.loras],
            layout=job.method.views.layout,
            view_size=job.method.views.size,
            stride=job.method.views.stride,
            mad_steps=job.method.mad.steps,
            mad_blocks=job.method.mad.blocks,
            cross_attention=job.method.mad.cross_attention,
            scheduler=job.sampling.scheduler,
            original_inference_steps=job.sampling.original_inference_steps,
            dtype=job.backbone.dtype,
            device=device,
        )

    @torch.no_grad()
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
        decode: str = "auto",
        output: Literal["image", "latent"] = "image",
        on_step: Callable[[int], None] = lambda step: None,
    ) -> np.ndarray | Tensor:
        """Panoramas of one size, one for each prompt.

        Returns uint8 [B, height, width, 3], or with `output="latent"` float32 latents [B, C, height/f, width/f].
        `loop` closes the panorama: views, attention and decoding wrap around its left and right edge. `decode`: see
        the method of that name.
        Each prompt draws from its own `torch.Generator("cpu").manual_seed(seed)`: first the initial noise, then what
        the scheduler asks for. Raises UserError for sizes and settings that are not possible.
        """
        negatives = list(negative_prompts) if negative_prompts is not None else [""] * len(prompts)
        self._check(prompts, negatives, seeds, guidance_scale, output)
        layout = self.geometry.build(height, width, loop)
        spec, backbone = self.backbone.spec, self.backbone
        conditioning = backbone.encode_prompts(list(prompts), negatives, guidance_scale)
        scheduler = self.new_scheduler(num_inference_steps)
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
        return self.decode(latents, loop, decode)

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """A scheduler with its timesteps set; UserError if it has no such number of steps."""
        return self.backbone.new_scheduler(self.scheduler, num_inference_steps, self.original_inference_steps)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, loop: bool = False, decode: str = "auto") -> np.ndarray:
        """uint8 pictures [B, height, width, 3] of latents that `sample` gave.

        `decode`: `whole` pictures in one pass, `tiled` for less memory, or `auto`, which is `tiled` above 2^22 pixels.
        """
        if decode not in ("auto", "whole", "tiled"):
            raise UserError(f"decode must be 'auto', 'whole' or 'tiled', got {decode!r}")
        height, width = latents_BCHW.shape[-2:]
        large = height * width * self.backbone.spec.factor**2 > WHOLE_AT_MOST
        tiled = decode == "tiled" or (decode == "auto" and large)
        return to_uint8(self.backbone.decode(latents_BCHW, self.geometry.view_size if loop else 0, tiled))

    def _check(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float,
        output: str,
    ) -> None:
        if isinstance(prompts, str) or not len(prompts) == len(negatives) == len(seeds) or not prompts:
            raise UserError(
                f"need lists of as many prompts as negative prompts and seeds, "
                f"got {len(prompts)}, {len(negatives)}, {len(seeds)}"
            )
        if output not in ("image", "latent"):
            raise UserError(f"output must be 'image' or 'latent', got {output!r}")
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
