"""Sample panoramas from prompts and seeds; independent of datasets, files and Lightning."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from madgen.backbones import Backbone, Lora, PromptEmbeddings, as_lora, backbone_module
from madgen.backbones._borrowed import Borrowed, borrow
from madgen.backbones._schedulers import check_scheduler_object, scheduler_object
from madgen.config.schema import (
    BackboneConfig,
    Job,
    LoraConfig,
    MadConfig,
    MethodConfig,
    SamplingConfig,
    SamplingParams,
    SyncConfig,
    ViewsConfig,
    require_job,
)
from madgen.diffusion.denoise import Denoiser, Generators, OnStep, joint_diffusion
from madgen.diffusion.noise import align
from madgen.diffusion.reference import with_annex, without_annex
from madgen.diffusion.syncdiffusion import SyncGuidance, check_x0_prediction
from madgen.diffusion.views import Views
from madgen.hub.weights import ModelFiles, resolve_dtype
from madgen.sampling.denoisers import ConditionedDenoiser, ScheduledDenoiser
from madgen.sampling.diffusers_call import DiffusersCall
from madgen.sampling.geometry import Geometry
from madgen.sampling.inputs import PanoramaBatch, check_device, check_latents, check_negative_prompts, parse_batch
from madgen.sampling.method import Method, MethodOptions, method_config
from madgen.sampling.postprocess import check_output, convert, decodes_tiled, to_uint8
from madgen.sampling.regions import build_composition, check_regions_scheduler, flatten_rows, row_view_ids
from madgen.types import Region, Task
from madgen.utils.errors import UserError
from madgen.utils.seeding import generators, initial_noise
from madgen.utils.validation import listed, mapping, number, path, switch, text, text_or_none, whole, whole_or_none

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADING = threading.Lock()
"""transformers and diffusers change global state of PyTorch while they load a model."""


class PanoramaSampler(DiffusersCall):
    """Joint diffusion with one backbone and one method.

    `sample` takes seeds and returns arrays; the sampler itself is called like a diffusers pipeline.

    Each thread needs its own sampler. Load samplers in half precision while no other one is sampling: loading changes
    PyTorch's default dtype temporarily, which some schedulers, such as LCMScheduler, compute in.

    Examples:

    >>> sampler = PanoramaSampler.from_pretrained("demo", mad_steps=8)            # doctest: +SKIP
    >>> images = sampler.sample(["dunes at night"], height=128, width=768, seeds=[7])  # doctest: +SKIP
    >>> image = sampler("dunes at night", num_inference_steps=20).images[0]       # doctest: +SKIP
    """

    def __init__(self, backbone: Backbone, geometry: Geometry, method: Method, params: SamplingParams | None = None):
        self.backbone, self.geometry, self.method = backbone, geometry, method
        self.params = params or SamplingParams()
        """Defaults of all sampling methods."""
        self.size: tuple[int | None, int | None] = (None, None)
        """Default height and width in pixels; None: see `default_size`."""
        self.distance = _perceptual_distance(method, backbone)
        self.warn_if_truncated = True
        """Log a warning for the first prompt that is too long for the text encoder."""
        self._lock = threading.RLock()
        self._borrowed: Borrowed | None = None
        """The caller's pipeline that the backbone is part of."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | PathLike[str],
        *,
        name: str = BackboneConfig.name,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        loras: Sequence[Lora | Mapping[str, Any]] = (),
        prediction_type: str | None = None,
        layout: str = ViewsConfig.layout,
        view_size: int | None = None,
        stride: int | None = None,
        overlap_from: int | None = None,
        mad_steps: int = MadConfig().merged_steps,
        mad_blocks: Sequence[str] = MadConfig.blocks,
        cross_attention: str = MadConfig.cross_attention,
        positions: str = MadConfig.positions,
        sync_weight: float = SyncConfig.weight,
        sync_decay: float = SyncConfig.decay,
        sync_steps: int = SyncConfig.steps,
        sync_every: int = SyncConfig.every,
        sync_network: str = SyncConfig.network,
        region_bootstrapping: int | None = None,
        scheduler: Any = None,
        scheduler_options: Mapping[str, Any] | None = None,
        original_inference_steps: int | None = None,
        dtype: str = BackboneConfig.dtype,
        compile: bool = BackboneConfig.compile,
        device: str | torch.device = "cpu",
        overrides: Sequence[str] = (),
    ) -> PanoramaSampler:
        """Load a diffusers folder, a hub id, a single file or `demo`, and fuse `loras` into it.

        The arguments are the keys of `backbone`, `method` and `sampling` of a job, with the same defaults; see
        `madgen.config.schema`. `view_size` and `stride` are latent cells, None is the backbone's default. `mad_*` and
        `cross_attention` configure MAD, `sync_*` SyncDiffusion (weight 0: off). With `compile` the first panorama of
        each size takes a minute or more longer, and later ones less time.

        `scheduler` is the name of a diffusers scheduler, a scheduler, or its class, which is created with the config of
        the checkpoint's own. `overrides` are those of the command line, such as `["method.merge.operator=swap"]`: they
        set any key of `backbone`, `method` and `sampling`, and replace arguments. Those of `sampling` are the defaults
        of `sampler.sample(...)` and `sampler(...)`.

        Raises UserError, a ValueError with the message of the command line, for invalid values.
        """
        config_of_backbone = BackboneConfig(
            name=text("name", name),
            pretrained=path("pretrained", pretrained),
            revision=text_or_none("revision", revision),
            variant=text_or_none("variant", variant),
            config=None if config is None else path("config", config),
            loras=[_lora_config(lora) for lora in listed("loras", loras)],
            prediction_type=text_or_none("prediction_type", prediction_type),
            dtype=dtype,
            compile=switch("compile", compile),
        )
        method = method_config(
            layout=layout,
            view_size=view_size,
            stride=stride,
            overlap_from=overlap_from,
            mad_steps=mad_steps,
            mad_blocks=mad_blocks,
            cross_attention=cross_attention,
            positions=positions,
            sync_weight=sync_weight,
            sync_decay=sync_decay,
            sync_steps=sync_steps,
            sync_every=sync_every,
            sync_network=sync_network,
            region_bootstrapping=region_bootstrapping,
        )
        job, keys = _settings(
            config_of_backbone, method, scheduler, scheduler_options, original_inference_steps, overrides
        )
        sampler = cls.from_configs(job.backbone, job.method, SamplingParams.from_config(job.sampling), device)
        return sampler._configured(job.sampling, keys, scheduler)

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        *,
        scheduler: Any = None,
        scheduler_options: Mapping[str, Any] | None = None,
        original_inference_steps: int | None = None,
        overrides: Sequence[str] = (),
        **method: Unpack[MethodOptions],
    ) -> PanoramaSampler:
        """Sample with a loaded diffusers pipeline: its weights, LoRAs, scheduler, precision, device and offloading.

        The pipeline can be used as before: while the sampler works it installs its own attention processors, and
        restores the pipeline's afterwards. Call `from_pipe` once the pipeline is set up; scales of LoRAs may change
        later. `method`, `scheduler`, `scheduler_options`, `original_inference_steps` and `overrides`: see
        `from_pretrained`; of `backbone` they may set `max_sequence_length`, which is an argument of the call in
        diffusers.

        Raises UserError, naming it, for what is not supported in a pipeline: classes other than text-to-image pipelines
        of the supported families, IP-Adapters, other attention processors, compiled models, and a safety checker or
        watermark, which would be skipped.
        """
        job, keys = _settings(
            BackboneConfig(), method_config(**method), scheduler, scheduler_options, original_inference_steps, overrides
        )
        given = {key for key in keys if key.startswith("backbone.")} - {"backbone.max_sequence_length"}
        if given:
            raise UserError(f"{min(given)} cannot be set here: the backbone is the pipeline; use from_pretrained")
        with LOADING:
            borrowed = borrow(pipe, job.backbone.max_sequence_length)
        merging = Method.from_config(job.method)
        borrowed.backbone.merged_layers(merging.merging)  # raises for unknown blocks
        geometry = Geometry.from_config(borrowed.backbone.spec, job.method)
        params = SamplingParams.from_config(job.sampling)
        sampler = cls(borrowed.backbone, geometry, merging, params)
        sampler._borrowed = borrowed
        return sampler._configured(job.sampling, keys, scheduler)

    def _configured(self, size: SamplingConfig, keys: frozenset[str], scheduler: Any) -> PanoramaSampler:
        """Set the default size, if it is among the `keys` that were set, and a scheduler that is an object."""
        self.size = (
            size.height if "sampling.height" in keys else None,
            size.width if "sampling.width" in keys else None,
        )
        if self.backbone.spec.guidance == "none" and "sampling.guidance_scale" not in keys:
            self.params = replace(self.params, guidance_scale=0.0)
        if scheduler is not None and not isinstance(scheduler, str) and "sampling.scheduler" not in keys:
            self.scheduler = scheduler
        return self

    @classmethod
    def from_configs(
        cls,
        backbone: BackboneConfig,
        method: MethodConfig,
        params: SamplingParams | None = None,
        device: str | torch.device = "cpu",
    ) -> PanoramaSampler:
        """Like `from_pretrained`, from the configs of a job. Thread-safe: models are loaded one at a time."""
        device, settings = check_device(device), Method.from_config(method)
        files = ModelFiles.of(backbone.pretrained, backbone.revision, backbone.config)
        with LOADING:
            loaded = backbone_module(backbone.name).load(
                files.pretrained,
                revision=files.revision,
                variant=backbone.variant,
                config=files.config,
                loras=[Lora(lora.weights, lora.scale) for lora in backbone.loras],
                prediction_type=backbone.prediction_type,
                dtype=DTYPES[resolve_dtype(backbone.dtype, device.type)],
                device=device,
                offload=backbone.offload,
                max_sequence_length=backbone.max_sequence_length,
            )
            geometry = Geometry.from_config(loaded.spec, method)
            loaded.merged_layers(settings.merging)  # raises for unknown blocks
            if backbone.compile:
                loaded.compile()
            if not backbone.cuda_graphs:
                loaded.disable_cuda_graphs()
            return cls(loaded, geometry, settings, params)

    @classmethod
    def from_job(cls, job: Job, device: str | torch.device = "cpu") -> PanoramaSampler:
        """Load the sampler of a job. It does not warn of truncated prompts, which planning counts."""
        require_job(job)
        sampler = cls.from_configs(job.backbone, job.method, SamplingParams.from_config(job.sampling), device)
        sampler.warn_if_truncated = False
        sampler.size = job.sampling.height, job.sampling.width
        return sampler

    @torch.inference_mode(False)  # a trainer may have enabled it, and SyncDiffusion needs gradients
    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_steps: Sequence[int] | None = None,
        seeds: Sequence[int],
        loop: bool | None = None,
        regions: Sequence[Sequence[Region]] | None = None,
        decode: str | None = None,
        chunk_views: int | None = None,
        output: str = "image",
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Any:
        """Sample one panorama for each prompt, all of one size.

        Args:
            prompts: One prompt for each panorama.
            negative_prompts: One negative prompt for each panorama; None: no negative prompts.
            height: Height in pixels.
            width: Width in pixels.
            num_inference_steps: Number of denoising steps. None, as for the arguments below: the sampler's `params`,
                which are the defaults of a job's `sampling` unless it was created with others.
            guidance_scale: Weight of classifier-free guidance; values <= 1 disable it.
            guidance_steps: `(first, end)`, the only steps with guidance.
            seeds: One seed for each panorama, of `torch.Generator("cpu")`, which draws first the initial noise, then
                the noise of one view (for `method.noise.align` or a reference view), then the noise of the scheduler.
            loop: Close the panorama: views, attention and decoding wrap around its left and right edge.
            regions: A list of regions for each panorama: parts with their own prompts, over the panorama's prompt as
                the background.
            decode: See the method `decode`.
            chunk_views: Limit memory, at the cost of time: denoise prompt by prompt, and at most this many views at
                once (all of a prompt's views where attention merges them). Changes only the last bits of the latents.
            output: `image`, `pil`, `np`, `pt` or `latent`.
            on_step: Called with the index of each finished step.

        Returns:
            `image`: uint8 [B, height, width, 3]; `pil`: a list of images; `np`: float32 [B, height, width, 3] in 0..1;
            `pt`: float32 [B, 3, height, width] in 0..1; `latent`: float32 latents [B, C, height/f, width/f].

        Raises:
            UserError: for impossible sizes and settings.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        batch = parse_batch(height, width, prompts, negative_prompts, seeds, regions)
        params = self.merged_params(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            loop=loop,
            decode=decode,
        )
        chunk_views = whole_or_none("chunk_views", chunk_views, 1)
        check_output("output", output, ("image", "pil", "np", "pt", "latent"))
        if not callable(on_step):
            raise UserError(f"on_step must be a function of the step, got {on_step!r}")

        def report(step: int, timestep: Tensor, latents_BCHW: Tensor) -> Tensor:
            on_step(step)
            return latents_BCHW

        with self.exclusively():
            latents = self.sample_latents(batch, params, chunk_views, report)
            if output == "latent":
                return latents
            return convert(self.decode_pixels(latents, params.loop, params.decode), output)

    def merged_params(
        self, *, num_inference_steps: Any, guidance_scale: Any, guidance_steps: Any, loop: Any, decode: Any
    ) -> SamplingParams:
        """Return the sampler's `params` with other values where they are not None. Raises UserError."""
        given: dict[str, Any] = {}
        if num_inference_steps is not None:
            given["num_inference_steps"] = whole("num_inference_steps", num_inference_steps, 1)
        if guidance_scale is not None:
            given["guidance_scale"] = number("guidance_scale", guidance_scale, 0)
        if guidance_steps is not None:
            steps = [whole("each of guidance_steps", step) for step in listed("guidance_steps", guidance_steps)]
            given["guidance_steps"] = tuple(steps)
        if loop is not None:
            given["loop"] = switch("loop", loop)
        if decode is not None:
            given["decode"] = text("decode", decode)
        return replace(self.params, **given)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of `sampler(...)` without a size: that of the presets in `configs/backbone/`."""
        side = self.backbone.spec.view_size * self.backbone.spec.factor
        views = 1 if self.geometry.layout == "whole" else 6 if side <= 512 else 4
        height, width = self.size
        return side if height is None else height, views * side if width is None else width

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample_latents(
        self,
        batch: PanoramaBatch,
        params: SamplingParams | None = None,
        chunk_views: int | None = None,
        on_step: OnStep = lambda step, timestep, latents_BCHW: latents_BCHW,
    ) -> Tensor:
        """Sample the panoramas of a batch, float32 [B, C, height/f, width/f].

        `params`: None for those of the sampler; `on_step`: see `joint_diffusion`; other arguments: see `sample`.
        """
        params = params or self.params
        layout = self.geometry.build(batch.height, batch.width, params.loop)
        first = self.geometry.overlap_from
        if first is not None and first >= params.num_inference_steps:
            raise UserError(f"overlap_from={first} must be < num_inference_steps={params.num_inference_steps}")
        self.method.merge.check_steps(self.method.merging.steps, params.num_inference_steps)
        self.method.check_regions(batch.regions)
        self._check_guidance(batch, params)
        with self.exclusively():
            self._warn_if_truncated(batch.all_texts)
            scheduler = self._new_scheduler(params, layout.at(0))
            noise, generator = self._noise(batch, scheduler)
            bootstrapping = self.method.bootstrapped_steps(params.num_inference_steps)
            check_regions_scheduler(type(scheduler), batch.regions, bootstrapping)
            size = batch.height, batch.width
            composition = build_composition(
                batch.regions, self.backbone, noise, size, batch.seeds, params.loop, bootstrapping
            )
            guided = self._encode(batch, params, chunk_views)
            denoiser: Denoiser = guided
            if composition is not None and composition.bootstrap is not None:
                separate = guided.conditioning.regrouped(row_view_ids(batch.regions, bootstrapped=True))
                steps = range(composition.bootstrap.steps)
                denoiser = ScheduledDenoiser(replace(guided, conditioning=separate), denoiser, steps)
            if params.guidance_steps is not None:
                unguided = replace(guided, conditioning=guided.conditioning.unguided())
                denoiser = ScheduledDenoiser(denoiser, unguided, params.guided_steps)
            sync = self._sync_guidance(guided)
            width = batch.width // self.backbone.spec.factor
            latents = joint_diffusion(
                noise, scheduler, layout, denoiser, generator,
                merger=self.method.merger, composition=composition, sync=sync, on_step=without_annex(on_step, width),
            )  # fmt: skip
            return latents[..., :width]

    def _noise(self, batch: PanoramaBatch, scheduler: Any) -> tuple[Tensor, Generators]:
        """Return the initial noise and the generators of later noise; apply custom timesteps to `scheduler`."""
        inputs, device = batch.inputs, scheduler.timesteps.device
        if inputs is None:
            seeded = generators(batch.seeds)
            noise = self._initial_noise(batch, lambda *shape: initial_noise(seeded, *shape[1:]))
            return noise.to(device), seeded
        inputs.apply_schedule(scheduler)
        return self._initial_noise(batch, lambda *shape: inputs.draw(shape, device), inputs.latents), inputs.generator

    def _initial_noise(
        self, batch: PanoramaBatch, draw: Callable[..., Tensor], latents_BCHW: Tensor | None = None
    ) -> Tensor:
        """Draw the noise of the canvas, unless it is given, and after it that of one view if the method needs it."""
        spec, size, count = self.backbone.spec, self.geometry.view_size, len(batch.prompts)
        shape = count, spec.channels, batch.height // spec.factor, batch.width // spec.factor
        noise = draw(*shape) if latents_BCHW is None else latents_BCHW.to(self.backbone.device, torch.float32)
        if noise.shape != shape:
            raise UserError(f"latents must be of shape {shape} for this size, got {tuple(noise.shape)}")
        if not self.method.draws_view_noise:
            return noise
        view = draw(count, spec.channels, size, size)
        noise = align(noise, view, self.method.align)
        return with_annex(noise, view) if self.method.merge.reference_steps else noise

    def _encode(self, batch: PanoramaBatch, params: SamplingParams, chunk_views: int | None) -> ConditionedDenoiser:
        options: dict[str, Any] = {}
        if batch.inputs is not None and batch.inputs.embeddings:
            options["embeddings"] = self._checked_embeddings(batch, batch.inputs.embeddings)
        conditioning = self.backbone.encode_prompts(
            flatten_rows(batch.prompts, [[region.text for region in regions] for regions in batch.regions]),
            flatten_rows(batch.negatives, [[region.negative for region in regions] for regions in batch.regions]),
            params.guidance_scale,
            # SyncDiffusion changes the views of each prompt differently
            row_view_ids(batch.regions, bootstrapped=False) if self.method.sync is None else None,
            **options,
        )
        return ConditionedDenoiser(self.backbone, self.method.merging, conditioning, chunk_views)

    def keep_prompts(self, tasks: Sequence[Task], params: SamplingParams | None = None) -> None:
        """Encode the distinct prompts of coming tasks once, and forget those of earlier calls."""
        params = params or self.params
        guided = self.backbone.spec.guidance == "cfg" and params.guidance_scale > 1
        texts = [text for task in tasks for text in task.prompt.texts(guided)]
        with self.exclusively():
            self.backbone.keep_prompts(texts)

    def _checked_embeddings(self, batch: PanoramaBatch, embeddings: PromptEmbeddings) -> PromptEmbeddings:
        if any(batch.regions):
            raise UserError("prompt_embeds cannot be combined with regions; pass prompts")
        if "embeddings" not in inspect.signature(self.backbone.encode_prompts).parameters:
            raise UserError(
                f"prompt_embeds are not supported by the backbone {type(self.backbone).__name__}; pass prompts"
            )
        return embeddings

    def _check_guidance(self, batch: PanoramaBatch, params: SamplingParams) -> None:
        check_negative_prompts(self.backbone.spec, batch.all_negatives, params.guidance_scale)
        embedded, sync = self.backbone.spec.guidance != "cfg", self.method.sync
        if params.guidance_steps is not None and (embedded or sync is not None):
            reason = "SyncDiffusion predicts images at every step" if sync else "the backbone embeds its guidance"
            raise UserError(f"guidance_steps has no effect: {reason}; remove it")

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Reserve the sampler for this thread within this context; UserError if another thread uses it."""
        if not self._lock.acquire(blocking=False):
            raise UserError("this sampler is in use in another thread; create one sampler for each thread")
        try:
            with self._attached():
                yield
        finally:
            self._lock.release()

    def _attached(self) -> AbstractContextManager[None]:
        return nullcontext() if self._borrowed is None else self._borrowed.attached()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def cut_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that the text encoder truncates, None if the prompt fits."""
        with self._attached():
            return self.backbone.cut_text(prompt)

    def _warn_if_truncated(self, texts: Sequence[str]) -> None:
        cut = next(filter(None, map(self.cut_text, texts)), None) if self.warn_if_truncated else None
        if cut is not None:
            self.warn_if_truncated = False
            logger.warning("a prompt is too long for the text encoder, which ignores %r", cut[:60])

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """Create a scheduler with its timesteps set; UserError if the method or the number of steps is impossible."""
        return self._new_scheduler(replace(self.params, num_inference_steps=num_inference_steps, guidance_steps=None))

    def _new_scheduler(self, params: SamplingParams, views: Views | None = None) -> Any:
        """Create a scheduler for steps of `views`; None: of views of the geometry's size."""
        cells = self.geometry.view_size**2 if views is None else views.rows.size * views.columns.size
        scheduler = self.backbone.new_scheduler(
            params.scheduler,
            params.num_inference_steps,
            params.original_inference_steps,
            cells,
            params.scheduler_options,
        )
        self.method.check_scheduler(scheduler)
        if self.method.sync is not None:
            shape = (1, self.backbone.spec.channels, 1, 3)
            zeros = torch.zeros(shape, dtype=torch.float32, device=scheduler.timesteps.device)
            try:
                check_x0_prediction(scheduler, zeros)
            except ValueError as error:
                known = "FlowMatchEulerDiscrete" if self.backbone.spec.joint_attention else "DDIM"
                raise UserError(f"method.sync: {error}; use for example {known}Scheduler") from error
        return scheduler

    def _sync_guidance(self, denoiser: ConditionedDenoiser) -> SyncGuidance | None:
        if self.method.sync is None:
            return None
        assert self.distance is not None
        # Decoding with gradients is never compiled, so enable them for the anchor too, which must be decoded alike.
        decode = torch.enable_grad()(self.backbone.decode)
        return SyncGuidance(self.method.sync, denoiser.predict_separately, decode, self.distance)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, loop: bool = False, decode: str = "auto") -> np.ndarray:
        """Decode latents that `sample` returned to images, uint8 [B, height, width, 3].

        `decode`: `whole` images in one pass, `tiled` for less memory, or `auto`, which is `tiled` above 2^22 pixels.
        """
        return to_uint8(self.decode_pixels(latents_BCHW, loop, decode))

    @torch.no_grad()
    def decode_pixels(self, latents_BCHW: Tensor, loop: bool = False, decode: str = "auto") -> Tensor:
        """Like `decode`, before rounding: float32 [B, 3, height, width] in 0..1."""
        replace(self.params, decode=text("decode", decode))  # validates it
        check_latents(latents_BCHW, self.backbone.spec.channels)
        wrap = self.geometry.view_size if switch("loop", loop) else 0
        height, width = (extent * self.backbone.spec.factor for extent in latents_BCHW.shape[-2:])
        with self.exclusively():
            return self.backbone.decode(latents_BCHW, wrap, decodes_tiled(height, width, decode))

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler whose class and config are used unless `params.scheduler` names another class."""
        backbone: Any = self.backbone
        return backbone.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        backbone: Any = self.backbone
        backbone.scheduler = scheduler_object(scheduler, backbone.scheduler)
        self.params = replace(self.params, scheduler=None)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoising network."""
        return self.backbone.dtype

    def in_float32(self) -> AbstractContextManager[None]:
        """Run all models in float32 within this context, then restore their precision."""
        return self.backbone.in_float32()

    def release_memory(self) -> bool:
        """Free performance caches when memory runs out; return False if there are none."""
        return self.backbone.release_memory()

    def disable_cuda_graphs(self) -> None:
        """Free CUDA graphs and use none from now on."""
        self.backbone.disable_cuda_graphs()


def _perceptual_distance(method: Method, backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Load the network of SyncDiffusion, before anything is sampled or written."""
    if method.sync is None:
        return None
    from madgen.models.perceptual import lpips

    return lpips(method.sync_network, backbone.device)


def _settings(
    backbone: BackboneConfig,
    method: MethodConfig,
    scheduler: Any,
    scheduler_options: Mapping[str, Any] | None,
    original_inference_steps: int | None,
    overrides: Sequence[str],
) -> tuple[Job, frozenset[str]]:
    """Build the configs of a sampler from arguments and overrides; a scheduler that is no name is not part of them."""
    if scheduler is not None and not isinstance(scheduler, str):
        check_scheduler_object(scheduler)
    sampling = SamplingConfig(
        scheduler=scheduler if isinstance(scheduler, str) else None,
        scheduler_options=mapping("scheduler_options", scheduler_options or {}),
        original_inference_steps=whole_or_none("original_inference_steps", original_inference_steps),
    )
    job = Job(backbone=backbone, method=method, sampling=sampling)
    overrides = listed("overrides", overrides)
    if not overrides:
        return job, frozenset()
    from madgen.config.overrides import overridden  # imports OmegaConf

    return overridden(job, overrides)


def _lora_config(value: Lora | Mapping[str, Any]) -> LoraConfig:
    lora = as_lora(value)
    return LoraConfig(weights=lora.weights, scale=lora.scale)
