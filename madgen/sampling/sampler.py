"""Prompts and seeds in, panoramas out. Knows nothing of datasets, of files or of Lightning."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from madgen.backbones import Backbone, Lora, as_lora, backbone_module
from madgen.config.schema import (
    BackboneConfig,
    Job,
    LoraConfig,
    MadConfig,
    MethodConfig,
    RegionsConfig,
    SamplingConfig,
    SyncConfig,
    ViewsConfig,
    require_job,
)
from madgen.diffusion.denoise import Denoiser, joint_diffusion
from madgen.diffusion.syncdiffusion import SyncGuidance, check_foresight
from madgen.diffusion.views import Layout
from madgen.hub.weights import ModelFiles, resolve_dtype
from madgen.sampling.denoisers import BySteps, Conditioned
from madgen.sampling.geometry import Geometry
from madgen.sampling.inputs import (
    Asked,
    asked,
    check_decode,
    check_device,
    check_latents,
    check_negative_prompts,
    guidance_range,
)
from madgen.sampling.method import Method, method_of
from madgen.sampling.postprocess import decodes_tiled, to_uint8
from madgen.sampling.regions import check_regions_scheduler, composition, rows, seen
from madgen.types import Region
from madgen.utils.errors import UserError
from madgen.utils.seeding import generators, initial_noise
from madgen.utils.validation import listed, number, path, switch, text, text_or_none, texts, whole, whole_or_none

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADING = threading.Lock()
"""transformers and diffusers change PyTorch for the whole process while they load a model."""


class PanoramaSampler:
    """Joint diffusion with one backbone and one method; of several threads each takes a sampler of its own.

    Those in half precision are loaded while none is at work: until then PyTorch's default dtype is theirs, and some
    schedulers, such as LCMScheduler, compute in it.

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
        self._free = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        *,
        name: str = BackboneConfig.name,
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
        dtype: str = BackboneConfig.dtype,
        compile: bool = BackboneConfig.compile,
        device: str | torch.device = "cpu",
    ) -> PanoramaSampler:
        """Loads a diffusers folder, a hub id, a single file or `demo`, and fuses `loras` (weights, scale) into it.

        Sizes are latent cells, None ones the backbone's own. `config`: see `backbone.config` of the job. `mad_*` and
        `cross_attention` steer MAD, `sync_*` SyncDiffusion (weight 0: off), `region_bootstrapping` is a number of
        steps: see the keys of `method` in `madgen.config.schema`, whose defaults they share. `compile`: the
        first panorama of each size takes a minute or more longer, the others less time.
        """
        return cls.from_configs(
            BackboneConfig(
                name=text("name", name),
                pretrained=path("pretrained", pretrained),
                revision=text_or_none("revision", revision),
                variant=text_or_none("variant", variant),
                config=None if config is None else path("config", config),
                loras=[_lora_config(lora) for lora in listed("loras", loras)],
                dtype=dtype,
                compile=switch("compile", compile),
            ),
            MethodConfig(
                views=ViewsConfig(
                    layout=layout,
                    size=whole_or_none("view_size", view_size),
                    stride=whole_or_none("stride", stride),
                    overlap_from=whole_or_none("overlap_from", overlap_from),
                ),
                mad=MadConfig(
                    steps=whole("mad_steps", mad_steps),
                    blocks=tuple(texts("mad_blocks", mad_blocks)),
                    cross_attention=cross_attention,
                ),
                sync=SyncConfig(
                    weight=number("sync_weight", sync_weight),
                    decay=number("sync_decay", sync_decay),
                    steps=whole("sync_steps", sync_steps),
                    every=whole("sync_every", sync_every),
                    network=sync_network,
                ),
                regions=RegionsConfig(bootstrapping=whole_or_none("region_bootstrapping", region_bootstrapping)),
            ),
            text_or_none("scheduler", scheduler),
            whole_or_none("original_inference_steps", original_inference_steps),
            device,
        )

    @classmethod
    def from_configs(
        cls,
        backbone: BackboneConfig,
        method: MethodConfig,
        scheduler: str | None = None,
        original_inference_steps: int | None = None,
        device: str | torch.device = "cpu",
    ) -> PanoramaSampler:
        """As `from_pretrained`, of what a job says; one at a time, also where several threads ask for one."""
        device, views, how = check_device(device), method.views, method_of(method)
        files = ModelFiles.of(backbone.pretrained, backbone.revision, backbone.config)
        with LOADING:
            loaded = backbone_module(backbone.name).load(
                files.pretrained,
                revision=files.revision,
                variant=backbone.variant,
                config=files.config,
                loras=[Lora(lora.weights, lora.scale) for lora in backbone.loras],
                dtype=DTYPES[resolve_dtype(backbone.dtype, device.type)],
                device=device,
            )
            geometry = Geometry(loaded.spec, views.layout, views.size, views.stride, how.merging, views.overlap_from)
            loaded.merged_layers(how.merging)
            if backbone.compile:
                loaded.compile()
            if not backbone.cuda_graphs:
                loaded.forgo_graphs()
            return cls(loaded, geometry, how, scheduler, original_inference_steps)

    @classmethod
    def from_job(cls, job: Job, device: str | torch.device = "cpu") -> PanoramaSampler:
        """The sampler that a job file asks for; cut prompts are counted where the job is planned, not here."""
        require_job(job)
        scheduler, original = job.sampling.scheduler, job.sampling.original_inference_steps
        sampler = cls.from_configs(job.backbone, job.method, scheduler, original, device)
        sampler.warns_of_cuts = False
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
        what = asked(prompts, negative_prompts, seeds, regions)
        height, width, loop = whole("height", height), whole("width", width), switch("loop", loop)
        steps = whole("num_inference_steps", num_inference_steps, 1)
        scale = number("guidance_scale", guidance_scale, 0)
        chunk_views = whole_or_none("chunk_views", chunk_views, 1)
        check_decode(decode)
        if not isinstance(output, str) or output not in ("image", "latent"):
            raise UserError(f"output must be 'image' or 'latent', got {output!r}")
        if not callable(on_step):
            raise UserError(f"on_step must be a function of the step, got {on_step!r}")
        guided = range(steps) if guidance_steps is None else self._guidance_range(guidance_steps, scale, steps)
        layout = self.geometry.build(height, width, loop)
        first = self.geometry.overlap_from
        if first is not None and first >= steps:
            raise UserError(f"overlap_from={first} is beyond the last of {steps} steps; leave it out")
        check_negative_prompts(self.backbone.spec, what.all_negatives, scale)
        with self._in_this_thread():
            self._warn_of_cuts(what.all_texts)
            latents = self._latents(what, (height, width), layout, loop, steps, scale, guided, chunk_views, on_step)
            return latents if output == "latent" else self.decode(latents, loop, decode)

    @contextmanager
    def _in_this_thread(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise UserError("this sampler is at work in another thread; give each thread a sampler of its own")
        try:
            yield
        finally:
            self._free.release()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_free"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _free=threading.RLock())

    def _latents(
        self,
        what: Asked,
        size: tuple[int, int],
        layout: Layout,
        loop: bool,
        steps: int,
        guidance_scale: float,
        guided_steps: range,
        chunk_views: int | None,
        on_step: Callable[[int], None],
    ) -> Tensor:
        conditioning = self.backbone.encode_prompts(
            rows(what.prompts, [[region.text for region in parts] for parts in what.regions]),
            rows(what.negatives, [[region.negative for region in parts] for parts in what.regions]),
            guidance_scale,
            seen(what.regions, False) if self.method.sync is None else None,  # it pulls each prompt's views its own way
        )
        scheduler = self.new_scheduler(steps)
        bootstrapping = self.method.bootstrapped_steps(steps)
        check_regions_scheduler(type(scheduler), what.regions, bootstrapping)
        draws, spec = generators(what.seeds), self.backbone.spec
        noise = initial_noise(draws, spec.channels, *(extent // spec.factor for extent in size))
        noise = noise.to(scheduler.timesteps.device)
        together = composition(what.regions, self.backbone, noise, size, what.seeds, loop, bootstrapping)
        guided = Conditioned(self.backbone, self.method.merging, conditioning, chunk_views)
        denoiser: Denoiser = guided
        if together is not None and together.bootstrap is not None:
            apart = replace(guided, conditioning=conditioning.where(seen(what.regions, True)))
            denoiser = BySteps(apart, denoiser, range(together.bootstrap.steps))
        if len(guided_steps) < steps:
            unguided = replace(guided, conditioning=conditioning.unguided())
            denoiser = BySteps(denoiser, unguided, guided_steps)
        return joint_diffusion(
            noise,
            scheduler,
            layout,
            denoiser,
            draws,
            composition=together,
            sync=self._sync(guided),
            on_step=on_step,
        )

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
            nothing = torch.zeros(
                1, self.backbone.spec.channels, 1, 3, dtype=torch.float32, device=scheduler.timesteps.device
            )
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
        check_latents(latents_BCHW, self.backbone.spec.channels)
        wrap = self.geometry.view_size if switch("loop", loop) else 0
        height, width = (extent * self.backbone.spec.factor for extent in latents_BCHW.shape[-2:])
        with self._in_this_thread():
            return self.backbone.decode(latents_BCHW, wrap, decodes_tiled(height, width, decode))

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

    def _guidance_range(self, asked_for: Sequence[int], guidance_scale: float, count: int) -> range:
        if self.backbone.spec.guidance_embedded or self.method.sync is not None:
            reason = "SyncDiffusion foresees pictures at every step" if self.method.sync else "its guidance is embedded"
            raise UserError(f"guidance_steps has no meaning here: {reason}; leave it out")
        return guidance_range(asked_for, guidance_scale, count)


def _distance(method: Method, backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What SyncDiffusion compares pictures with, loaded before anything is sampled or written."""
    if method.sync is None:
        return None
    from madgen.models.perceptual import lpips

    return lpips(method.sync_network, backbone.device)


def _lora_config(value: Lora | Mapping[str, Any]) -> LoraConfig:
    lora = as_lora(value)
    return LoraConfig(weights=lora.weights, scale=lora.scale)
