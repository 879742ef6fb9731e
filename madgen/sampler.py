"""Prompts and seeds in, panoramas out. Knows nothing of datasets, of files or of Lightning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from madgen.backbones import Backbone, Lora, Merging, as_lora, backbone_module
from madgen.checks import (
    check_decode,
    check_device,
    check_guidance_steps,
    check_negative_prompts,
    check_numbers,
    check_regions,
    check_whole,
)
from madgen.composition import check_regions_scheduler, composition, rows, seen
from madgen.denoising import BySteps, Conditioned
from madgen.errors import UserError
from madgen.geometry import Geometry
from madgen.joint.loop import Denoiser, joint_diffusion
from madgen.joint.schedule import SyncSchedule
from madgen.joint.sync import SyncGuidance, check_foresight
from madgen.schema import Job, MadConfig, SamplingConfig, SyncConfig, ViewsConfig
from madgen.seeding import generators, initial_noise
from madgen.types import Region
from madgen.weights import resolve_dtype, resolve_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE_AT_MOST = 2**22
"""Pixels that `decode: auto` decodes in one pass; of the size alone, so that the bytes do not depend on the memory."""


@dataclass(frozen=True)
class Method:
    """What is done besides denoising views: see `method` of the job."""

    merging: Merging
    sync: SyncSchedule | None = None
    sync_network: str = "vgg"
    bootstrapping: int | None = None

    def __post_init__(self) -> None:
        if self.bootstrapping is not None and self.bootstrapping < 0:
            raise UserError(f"region_bootstrapping must be >= 0 steps or None, got {self.bootstrapping}")

    def bootstrapped_steps(self, num_inference_steps: int) -> int:
        """Two fifths of the steps unless asked otherwise: the released code takes 20 of 50."""
        wanted = round(0.4 * num_inference_steps) if self.bootstrapping is None else self.bootstrapping
        return min(wanted, num_inference_steps)


class PanoramaSampler:
    """Joint diffusion with one backbone and one method; of several threads each takes a sampler of its own.

    >>> sampler = PanoramaSampler.from_pretrained("demo", mad_steps=8)            # doctest: +SKIP
    >>> images = sampler.sample(["dunes at night"], height=128, width=768, seeds=[7])  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: Backbone,
        geometry: Geometry,
        method: Method,
        scheduler: str | None = None,
        original_inference_steps: int | None = None,
    ):
        self.backbone, self.geometry, self.method, self.scheduler = backbone, geometry, method, scheduler
        self.original_inference_steps = original_inference_steps
        self.distance = _distance(method, backbone)
        self.warns_of_cuts = True
        """Once, on stderr, of the first prompt that is too long for the text encoder."""

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
        layout: str = ViewsConfig.layout,
        view_size: int | None = None,
        stride: int | None = None,
        overlap_from: int | None = None,
        mad_steps: int = MadConfig.steps,
        mad_blocks: Sequence[str] = MadConfig.blocks,
        cross_attention: str = MadConfig.cross_attention,
        sync_weight: float = SyncConfig.weight,
        sync_decay: float = SyncConfig.decay,
        sync_steps: int = SyncConfig.steps,
        sync_every: int = SyncConfig.every,
        sync_network: str = SyncConfig.network,
        region_bootstrapping: int | None = None,
        scheduler: str | None = None,
        original_inference_steps: int | None = None,
        dtype: str = "auto",
        compile: bool = False,
        device: str | torch.device = "cpu",
    ) -> PanoramaSampler:
        """Loads a diffusers folder, a hub id, a single file or `demo`, and fuses `loras` (weights, scale) into it.

        Sizes are latent cells, None ones the backbone's own. `config`: see `backbone.config` of the job. `mad_*` and
        `cross_attention` steer MAD, `sync_*` SyncDiffusion (weight 0: off), `region_bootstrapping` is a number of
        steps: see the keys of `method` in `madgen.schema`, whose defaults they share. `compile`: the first panorama of
        each size takes a minute or more longer, the others less time.
        """
        folder, device = resolve_pretrained(pretrained), check_device(device)
        check_whole(view_size=view_size, stride=stride, overlap_from=overlap_from, mad_steps=mad_steps)
        check_whole(sync_steps=sync_steps, sync_every=sync_every, region_bootstrapping=region_bootstrapping)
        check_whole(original_inference_steps=original_inference_steps)
        # Refuses what a job may not ask for either.
        ViewsConfig(layout=layout, size=view_size, stride=stride, overlap_from=overlap_from)
        MadConfig(steps=mad_steps, blocks=tuple(mad_blocks), cross_attention=cross_attention)
        SyncConfig(weight=sync_weight, decay=sync_decay, steps=sync_steps, every=sync_every, network=sync_network)
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
        merging = Merging(mad_steps, tuple(mad_blocks), cross_attention)
        geometry = Geometry(backbone.spec, layout, view_size, stride, merging, overlap_from)
        backbone.merged_layers(merging)
        if compile:
            backbone.compile()
        if sync_weight and layout == "whole":
            raise UserError("SyncDiffusion (sync weight > 0) compares views; layout=whole has only one")
        sync = SyncSchedule(sync_weight, sync_decay, sync_steps, sync_every) if sync_weight else None
        method = Method(merging, sync, sync_network, region_bootstrapping)
        return cls(backbone, geometry, method, scheduler, original_inference_steps)

    @classmethod
    def from_job(cls, job: Job, device: str | torch.device = "cpu") -> PanoramaSampler:
        """The sampler that a job file asks for; cut prompts are counted where the job is planned, not here."""
        sampler = cls.from_pretrained(
            job.backbone.pretrained,
            name=job.backbone.name,
            revision=job.backbone.revision,
            variant=job.backbone.variant,
            config=job.backbone.config,
            loras=[Lora(lora.weights, lora.scale) for lora in job.backbone.loras],
            layout=job.method.views.layout,
            view_size=job.method.views.size,
            stride=job.method.views.stride,
            overlap_from=job.method.views.overlap_from,
            **mad_options(job.method.mad),
            **sync_options(job.method.sync),
            region_bootstrapping=job.method.regions.bootstrapping,
            scheduler=job.sampling.scheduler,
            original_inference_steps=job.sampling.original_inference_steps,
            dtype=job.backbone.dtype,
            compile=job.backbone.compile,
            device=device,
        )
        sampler.warns_of_cuts = False
        if not job.backbone.cuda_graphs:
            sampler.forgo_graphs()
        return sampler

    @torch.inference_mode(False)  # a trainer may have switched it on, and SyncDiffusion needs gradients
    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        height: int,
        width: int,
        num_inference_steps: int = SamplingConfig.num_inference_steps,
        guidance_scale: float = SamplingConfig.guidance_scale,
        guidance_steps: Sequence[int] | None = None,
        seeds: Sequence[int],
        loop: bool = False,
        regions: Sequence[Sequence[Region]] | None = None,
        decode: str = "auto",
        chunk_views: int | None = None,
        output: Literal["image", "latent"] = "image",
        on_step: Callable[[int], None] = lambda step: None,
    ) -> np.ndarray | Tensor:
        """Panoramas of one size, one for each prompt.

        Returns uint8 [B, height, width, 3], or with `output="latent"` float32 latents [B, C, height/f, width/f].
        `loop` closes the panorama: views, attention and decoding wrap around its left and right edge. `regions` gives
        parts of each panorama prompts of their own, over the panorama's prompt as the background. `decode`: see the
        method of that name. `chunk_views`: for less memory and in more time, prompt after prompt and at most so many
        views at once (all of a prompt's where their attention merges); None: everything at once. Only the last bits
        of the latents depend on it.
        `guidance_steps`, (first, end): classifier-free guidance in these steps only.
        Each prompt draws from its own `torch.Generator("cpu").manual_seed(seed)`: first the initial noise, then what
        the scheduler asks for. Raises UserError for sizes and settings that are not possible.
        """
        if isinstance(negative_prompts, str):
            raise UserError(f"negative_prompts must be a list, got {negative_prompts!r}")
        negatives = list(negative_prompts) if negative_prompts is not None else [""] * len(prompts)
        self._check(prompts, negatives, seeds, guidance_scale, decode, output)
        check_whole(height=height, width=width)
        check_regions(regions, len(prompts))
        check_numbers(seeds, guidance_scale, num_inference_steps, chunk_views)
        self._warn_of_cuts([*prompts, *negatives, *(part.text for parts in regions or () for part in parts)])
        layout = self.geometry.build(height, width, loop)
        first = self.geometry.overlap_from
        if first is not None and first >= num_inference_steps:
            raise UserError(f"overlap_from={first} is beyond the last of {num_inference_steps} steps; leave it out")
        spec, regions = self.backbone.spec, regions or [()] * len(prompts)
        check_negative_prompts(spec, [region.negative for parts in regions for region in parts], guidance_scale)
        if guidance_steps is not None:
            self._check_guidance_steps(guidance_steps, guidance_scale, num_inference_steps)
        conditioning = self.backbone.encode_prompts(
            rows(prompts, [[region.text for region in parts] for parts in regions]),
            rows(negatives, [[region.negative for region in parts] for parts in regions]),
            guidance_scale,
            seen(regions, False) if self.method.sync is None else None,  # it pulls each prompt's views its own way
        )
        scheduler = self.new_scheduler(num_inference_steps)
        bootstrapping = self.method.bootstrapped_steps(num_inference_steps)
        check_regions_scheduler(type(scheduler), regions, bootstrapping)
        draws = generators(list(seeds))
        noise = initial_noise(draws, spec.channels, height // spec.factor, width // spec.factor)
        noise = noise.to(scheduler.timesteps.device)
        together = composition(regions, self.backbone, noise, (height, width), seeds, loop, bootstrapping)
        guided = Conditioned(self.backbone, self.method.merging, conditioning, chunk_views)
        denoiser: Denoiser = guided
        if together is not None and together.bootstrap is not None:
            apart = replace(guided, conditioning=conditioning.where(seen(regions, True)))
            denoiser = BySteps(apart, denoiser, range(together.bootstrap.steps))
        if guidance_steps is not None:
            unguided = replace(guided, conditioning=conditioning.unguided())
            denoiser = BySteps(denoiser, unguided, range(*guidance_steps))
        latents = joint_diffusion(
            noise,
            scheduler,
            layout,
            denoiser,
            draws,
            composition=together,
            sync=self._sync(guided),
            on_step=on_step,
        )
        if output == "latent":
            return latents
        return self.decode(latents, loop, decode)

    def cut_text(self, prompt: str) -> str | None:
        """The end of a prompt that the text encoder never sees, None if it sees all of it."""
        return self.backbone.cut_text(prompt)

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        lost = next(filter(None, map(self.cut_text, texts)), None) if self.warns_of_cuts else None
        if lost is not None:
            self.warns_of_cuts = False
            print(
                f"madgen: a prompt is too long for the text encoder, which does not see {lost[:60]!r}", file=sys.stderr
            )

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """A scheduler with its timesteps set; UserError if it has no such number of steps, or does not suit."""
        scheduler = self.backbone.new_scheduler(self.scheduler, num_inference_steps, self.original_inference_steps)
        if self.method.sync is not None:
            nothing = torch.zeros(1, self.backbone.spec.channels, 1, 3, device=scheduler.timesteps.device)
            try:
                check_foresight(scheduler, nothing)
            except ValueError as error:
                raise UserError(f"method.sync: {error}; take a scheduler such as DDIMScheduler") from error
        return scheduler

    def _sync(self, denoiser: Conditioned) -> SyncGuidance | None:
        if self.method.sync is None:
            return None
        assert self.distance is not None
        # With gradients never compiled; so the anchor, which takes none, is not either.
        decode = torch.enable_grad()(self.backbone.decode)
        return SyncGuidance(self.method.sync, denoiser, decode, self.distance)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, loop: bool = False, decode: str = "auto") -> np.ndarray:
        """uint8 pictures [B, height, width, 3] of latents that `sample` gave.

        `decode`: `whole` pictures in one pass, `tiled` for less memory, or `auto`, which is `tiled` above 2^22 pixels.
        """
        return to_uint8(self.decode_pixels(latents_BCHW, loop, decode))

    @torch.no_grad()
    def decode_pixels(self, latents_BCHW: Tensor, loop: bool = False, decode: str = "auto") -> Tensor:
        """As `decode`, before rounding: float32 [B, 3, height, width] in 0..1."""
        check_decode(decode)
        height, width = (extent * self.backbone.spec.factor for extent in latents_BCHW.shape[-2:])
        tiled = decodes_tiled(height, width, decode)
        return self.backbone.decode(latents_BCHW, self.geometry.view_size if loop else 0, tiled)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.backbone.dtype

    def in_float32(self) -> AbstractContextManager[None]:
        """Within it UNet, VAE and text encoders are float32, whatever `dtype` they were loaded in; then as before."""
        return self.backbone.in_float32()

    def release_memory(self) -> bool:
        """For when memory runs out: what is held for speed alone is given back; False if there is nothing."""
        return self.backbone.release_memory()

    def forgo_graphs(self) -> None:
        """No CUDA graphs from now on."""
        self.backbone.forgo_graphs()

    def _check(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float,
        decode: str,
        output: str,
    ) -> None:
        if isinstance(prompts, str) or not len(prompts) == len(negatives) == len(seeds) or not prompts:
            raise UserError(
                f"need lists, not empty, of as many prompts as negative prompts and seeds, "
                f"got {len(prompts)}, {len(negatives)}, {len(seeds)}"
            )
        check_decode(decode)
        if output not in ("image", "latent"):
            raise UserError(f"output must be 'image' or 'latent', got {output!r}")
        check_negative_prompts(self.backbone.spec, negatives, guidance_scale)

    def _check_guidance_steps(self, steps: Sequence[int], guidance_scale: float, count: int) -> None:
        if self.backbone.spec.guidance_embedded or self.method.sync is not None:
            reason = "SyncDiffusion foresees pictures at every step" if self.method.sync else "its guidance is embedded"
            raise UserError(f"guidance_steps has no meaning here: {reason}; leave it out")
        check_guidance_steps(steps, guidance_scale, count)


def decodes_tiled(height: int, width: int, decode: str) -> bool:
    """Whether panoramas of this size (pixels) are decoded in tiles."""
    return decode == "tiled" or (decode == "auto" and height * width > WHOLE_AT_MOST)


def _distance(method: Method, backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What SyncDiffusion compares pictures with, loaded before anything is sampled or written."""
    if method.sync is None:
        return None
    from madgen.perceptual import lpips

    return lpips(method.sync_network, backbone.device)


def mad_options(config: MadConfig) -> dict[str, Any]:
    """`method.mad` as arguments of `from_pretrained`."""
    return {"mad_steps": config.steps, "mad_blocks": config.blocks, "cross_attention": config.cross_attention}


def sync_options(config: SyncConfig) -> dict[str, Any]:
    """`method.sync` as arguments of `from_pretrained`."""
    return {f"sync_{name}": value for name, value in asdict(config).items()}


def to_uint8(pixels_B3HW: Tensor) -> np.ndarray:
    """Pixels in 0..1 to uint8 [B, H, W, 3]."""
    return levels(pixels_B3HW).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def levels(pixels: Tensor) -> Tensor:
    """0..1 to whole numbers of 0..255, rounded as diffusers does."""
    return (pixels * 255).round()
