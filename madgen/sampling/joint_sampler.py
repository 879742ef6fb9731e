"""Sample batches of prompts: from noise to latents and pixels, with one backbone and one method."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from madgen.backbones import Backbone, Conditioning, ControlledBackbone, PromptEmbeddings, quiet_model_libraries
from madgen.backbones._loaded_pipeline import Borrowed
from madgen.backbones._schedulers import example_for, scheduler_object
from madgen.config.schema import ControlNetConfig, SamplingParams
from madgen.diffusion.attention import JointStep, Merging
from madgen.diffusion.denoise import Denoiser, OnStep, joint_diffusion
from madgen.diffusion.operators import MergeOperator
from madgen.diffusion.reference import ReferenceSwap, check_history, without_annex
from madgen.diffusion.regions import Regions
from madgen.diffusion.syncdiffusion import SyncGuidance, check_x0_prediction
from madgen.diffusion.views import Views
from madgen.sampling.geometry import Geometry
from madgen.sampling.inputs import PanoramaBatch, check_latents
from madgen.sampling.method import Method
from madgen.sampling.noise import draw_noise
from madgen.sampling.pictures import canvases, check_adapters, check_pictures, keep_known, start_of
from madgen.sampling.postprocess import decodes_tiled, to_uint8
from madgen.sampling.regions import build_composition, flatten_rows, row_view_ids
from madgen.sampling.scheduler_checks import check_regions_scheduler, check_start_scheduler
from madgen.types import Task
from madgen.utils.errors import UserError
from madgen.utils.validation import switch, text

logger = logging.getLogger(__name__)


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


class JointSampler:
    """Sample batches with one backbone and one method; `PanoramaSampler` adds the public methods."""

    def __init__(self, backbone: Backbone, method: Method, params: SamplingParams | None = None):
        self.backbone, self.method = backbone, method
        self.geometry = Geometry(backbone.spec, method)
        self.params = params or SamplingParams()
        """Defaults of all sampling methods."""
        self.size: tuple[int | None, int | None] = (None, None)
        """Default height and width in pixels; None: see `default_size`."""
        self.distance = _perceptual_distance(method, backbone)
        self.warns = True
        """Log warnings, once each, of a prompt that is too long and of settings for more steps than run."""
        self._warned: set[str] = set()
        self._lock = threading.RLock()
        self._borrowed: Borrowed | None = None
        """The caller's pipeline that the backbone is part of."""
        self.control = ControlNetConfig()
        """Strength of the backbone's ControlNet, if it has one."""
        self.style_scale = 1.0
        """Weight of the style pictures, if the backbone has an IP-Adapter."""

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
        steps = params.denoising_steps(self.backbone.spec.joint_attention)
        method = self.method.for_steps(steps)
        geometry = self.geometry if method is self.method else Geometry(self.backbone.spec, method)
        layout = geometry.build(batch.height, batch.width, params.loop)
        first = self.geometry.overlap_from
        if first is not None and first >= steps:
            raise UserError(f"overlap_from={first} must be < num_inference_steps={steps}")
        method.config.merge.check_steps(method.merging.steps, steps, params)
        check_pictures(batch, params.init)
        self.method.check_regions(batch.regions)
        self._check_guidance(batch, params)
        check_adapters(self.backbone, batch, self.method)
        with self.exclusively():
            notes = method.excess_steps(steps, params.described(steps), geometry.layout)
            self._warn(batch.all_texts, notes)
            scheduler = self._new_scheduler(params, layout.at(0))
            if batch.inputs is not None:
                batch.inputs.apply_schedule(scheduler)
            noise, generator = draw_noise(batch, self.geometry, scheduler.timesteps.device)
            bootstrapping = self.method.bootstrapped_steps(steps)
            check_regions_scheduler(type(scheduler), batch.regions, bootstrapping)
            size = batch.height, batch.width
            composition = build_composition(
                batch.regions, self.backbone, noise, size, batch.seeds, params.loop, bootstrapping
            )
            guided = self._encode(batch, params, method.merging, chunk_views)
            if batch.control is not None or batch.style is not None:
                guided = self._with_pictures(guided, batch, steps)
            denoiser = self._scheduled(guided, batch, params, composition)
            sync = self._sync_guidance(guided)
            width = batch.width // self.backbone.spec.factor
            latents = joint_diffusion(
                noise, scheduler, layout, denoiser, generator,
                merger=_merger(method), composition=composition, sync=sync,
                on_step=without_annex(on_step, width),
                start=start_of(batch.pictures, self.backbone, self.geometry, scheduler, params, steps),
            )  # fmt: skip
            return latents[..., :width]

    def _scheduled(
        self, guided: ConditionedDenoiser, batch: PanoramaBatch, params: SamplingParams, composition: Regions | None
    ) -> Denoiser:
        """Return the denoiser of all steps: bootstrapped regions do not share views, and some steps are not guided."""
        denoiser: Denoiser = guided
        if composition is not None and composition.bootstrap is not None:
            separate = guided.conditioning.regrouped(row_view_ids(batch.regions, bootstrapped=True))
            bootstrapped = range(composition.bootstrap.steps)
            denoiser = ScheduledDenoiser(replace(guided, conditioning=separate), denoiser, bootstrapped)
        if params.guidance_steps is not None:
            unguided = replace(guided, conditioning=guided.conditioning.unguided())
            denoiser = ScheduledDenoiser(denoiser, unguided, params.guided_steps)
        return denoiser

    def _encode(
        self, batch: PanoramaBatch, params: SamplingParams, merging: Merging, chunk_views: int | None
    ) -> ConditionedDenoiser:
        options: dict[str, Any] = {}
        if batch.inputs is not None and batch.inputs.embeddings:
            options["embeddings"] = self._checked_embeddings(batch, batch.inputs.embeddings)
        with quiet_model_libraries():
            conditioning = self.backbone.encode_prompts(
                flatten_rows(batch.prompts, [[region.text for region in regions] for regions in batch.regions]),
                flatten_rows(batch.negatives, [[region.negative for region in regions] for regions in batch.regions]),
                params.guidance_scale,
                # SyncDiffusion changes the views of each prompt differently
                row_view_ids(batch.regions, bootstrapped=False) if self.method.sync is None else None,
                **options,
            )
        return ConditionedDenoiser(self.backbone, merging, conditioning, chunk_views)

    def _with_pictures(self, denoiser: ConditionedDenoiser, batch: PanoramaBatch, steps: int) -> ConditionedDenoiser:
        """Return the denoiser with the control and style pictures of the batch."""
        backbone, conditioning = cast(ControlledBackbone, self.backbone), denoiser.conditioning
        panoramas = [panorama for panorama, parts in enumerate(batch.regions) for _ in range(1 + len(parts))]
        if batch.control is not None:
            pixels, active = canvases(batch.control, batch.height, batch.width), self.control.active_steps(steps)
            conditioning = backbone.controlled(conditioning, pixels, panoramas, self.control.scale, active)
        if batch.style is not None:
            conditioning = backbone.styled(conditioning, batch.style, panoramas, self.style_scale)
        return replace(denoiser, conditioning=conditioning)

    def keep_prompts(self, tasks: Sequence[Task], params: SamplingParams | None = None) -> None:
        """Encode the distinct prompts of coming tasks once, and forget those of earlier calls."""
        params = params or self.params
        guided = self.backbone.spec.is_guided(params.guidance_scale)
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
        self.backbone.spec.check_guidance(params.guidance_scale, batch.all_negatives)
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
        with self._attached(), quiet_model_libraries():
            return self.backbone.cut_text(prompt)

    def _warn(self, texts: Sequence[str], notes: Sequence[str]) -> None:
        """Log the first text that the text encoder truncates, and notes, unless they have been logged."""
        if not self.warns:
            return
        for note in (note for note in notes if note not in self._warned):
            self._warned.add(note)
            logger.warning(note)
        cut = None if "cut" in self._warned else next(filter(None, map(self.cut_text, texts)), None)
        if cut is not None:
            self._warned.add("cut")
            logger.warning("a prompt is too long for the text encoder, which ignores %r", cut[:60])

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """Create a scheduler with its timesteps set; UserError if the method or the number of steps is impossible."""
        return self._new_scheduler(replace(self.params, num_inference_steps=num_inference_steps, guidance_steps=None))

    def _new_scheduler(self, params: SamplingParams, views: Views | None = None) -> Any:
        """Create a scheduler for steps of `views`; None: of views of the geometry's size."""
        cells = self.geometry.view_size**2 if views is None else views.rows.size * views.columns.size
        scheduler = self.backbone.new_scheduler(params, cells)
        _check_merge_scheduler(self.method, scheduler)
        if params.init.strength is not None:
            check_start_scheduler(type(scheduler), scheduler.config)
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
        return SyncGuidance(self.method.sync.at, denoiser.predict_separately, decode, self.distance)

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

    def decode_batch(self, latents_BCHW: Tensor, batch: PanoramaBatch, params: SamplingParams) -> Tensor:
        """Decode the latents of a batch, with the parts of its pictures that are kept: float32 [B, 3, H, W] in 0..1."""
        pixels = self.decode_pixels(latents_BCHW, params.loop, params.decode)
        return keep_known(pixels, batch.pictures, params) if batch.pictures else pixels

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of `sampler(...)` without a size: that of the presets in `configs/backbone/`."""
        side = self.backbone.spec.view_size * self.backbone.spec.factor
        views = 1 if self.geometry.layout == "whole" else 6 if side <= 512 else 4
        height, width = self.size
        return side if height is None else height, views * side if width is None else width

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
    def device(self) -> torch.device:
        """Device that the models run on."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoising network."""
        return self.backbone.dtype

    @property
    def has_lower_precision(self) -> bool:
        """Return whether `backbone.in_float32` is more precise: not in float32 already, nor with quantized weights."""
        return self.dtype != torch.float32 and not getattr(self.backbone, "is_quantized", False)


def _merger(method: Method) -> MergeOperator:
    """Return how predictions are merged, in the steps in which attention is not."""
    merge = method.config.merge
    options = merge.operator, merge.weights, merge.width, method.merging.steps
    return ReferenceSwap(*options, merge.reference_steps) if merge.reference_steps else MergeOperator(*options)


def _check_merge_scheduler(method: Method, scheduler: Any) -> None:
    """Raise UserError if the merge does not support a scheduler."""
    name, merge = type(scheduler).__name__, method.config.merge
    if merge.operator == "swap" and getattr(scheduler.config, "thresholding", False):
        raise UserError(
            f"method.merge.operator=swap needs cells that step independently, but {name} with thresholding=true "
            "clips by a quantile of the whole canvas; set thresholding=false"
        )
    if merge.reference_steps:
        try:
            check_history(scheduler)
        except ValueError as error:
            raise UserError(
                f"method.merge.reference_steps={merge.reference_steps} replaces latents between steps, but "
                f"{error}; use for example sampling.scheduler={example_for(scheduler)}"
            ) from error


def _perceptual_distance(method: Method, backbone: Backbone) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Load the network of SyncDiffusion, before anything is sampled or written."""
    if method.sync is None:
        return None
    from madgen.models.perceptual import lpips

    return lpips(method.sync.network, backbone.device)
