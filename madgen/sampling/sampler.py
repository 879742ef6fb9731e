"""Sample panoramas from prompts and seeds; independent of datasets, files and Lightning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Unpack

import torch
from torch import Tensor

from madgen.backbones import Lora, backbone_module
from madgen.backbones._loaded_pipeline import borrow
from madgen.backbones._schedulers import check_scheduler_object
from madgen.config.schema import (
    BackboneConfig,
    ControlNetConfig,
    Job,
    LoraConfig,
    MethodConfig,
    SamplingConfig,
    SamplingParams,
    require_job,
)
from madgen.config.unused_settings import unused_method_settings
from madgen.hub.adapters import ip_adapter_files
from madgen.hub.weights import ModelFiles, resolve_dtype
from madgen.sampling.diffusers_call import LOADING_ARGUMENTS, DiffusersCall, refuse
from madgen.sampling.inputs import check_device, parse_batch, parse_params
from madgen.sampling.method import METHOD_OPTIONS, Method, MethodOptions, method_config
from madgen.sampling.picture_arguments import one_each, parse_images, parse_pictures
from madgen.sampling.postprocess import check_output, convert
from madgen.types import Region
from madgen.utils.errors import UserError
from madgen.utils.garbage import collect_usually
from madgen.utils.validation import listed, mapping, number, path, switch, text, text_or_none, whole_or_none

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARGUMENTS_OF_PIPES = frozenset({"backbone.max_sequence_length", "backbone.controlnet"}) | {
    f"backbone.controlnet.{name}" for name in ("scale", "start", "end")
}
"""Keys of `backbone` that are arguments of the call in diffusers, and not part of a pipeline."""
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
        scheduler: Any = None,
        scheduler_options: Mapping[str, Any] | None = None,
        original_inference_steps: int | None = None,
        dtype: str = BackboneConfig.dtype,
        compile: bool = BackboneConfig.compile,
        device: str | torch.device = "cpu",
        overrides: Sequence[str] = (),
        **method: Unpack[MethodOptions],
    ) -> PanoramaSampler:
        """Load a diffusers folder, a hub id, a single file or `demo`, and fuse `loras` into it.

        The arguments are the keys of `backbone`, `method` and `sampling` of a job, with the same defaults; see
        `madgen.config.schema`. Those of `method` are `layout`, `view_size`, `stride` (latent cells; None is the
        backbone's default), `overlap_from`, `mad_steps`, `mad_blocks`, `cross_attention`, `positions`, `sync_weight`
        (0: no SyncDiffusion), `sync_decay`, `sync_steps`, `sync_every`, `sync_network` and `region_bootstrapping`. With
        `compile` the first panorama of each size takes a minute or more longer, and later ones less time.

        `scheduler` is the name of a diffusers scheduler, a scheduler, or its class, which is created with the config of
        the checkpoint's own. `overrides` are those of the command line, such as `["method.merge.operator=swap"]`: they
        set any key of `backbone`, `method` and `sampling`, and replace arguments. Those of `sampling` are the defaults
        of `sampler.sample(...)` and `sampler(...)`.

        Raises UserError, a ValueError with the message of the command line, for invalid values.
        """
        others = {option: value for option, value in method.items() if option not in METHOD_OPTIONS}
        refuse(others, "from_pretrained", LOADING_ARGUMENTS)
        config_of_backbone = BackboneConfig(
            name=text("name", name),
            pretrained=path("pretrained", pretrained),
            revision=text_or_none("revision", revision),
            variant=text_or_none("variant", variant),
            config=None if config is None else path("config", config),
            loras=[_lora(lora) for lora in listed("loras", loras)],
            prediction_type=text_or_none("prediction_type", prediction_type),
            dtype=dtype,
            compile=switch("compile", compile),
        )
        options = method_config(**{option: value for option, value in method.items() if option not in others})
        job, keys = _settings(
            config_of_backbone, options, scheduler, scheduler_options, original_inference_steps, overrides
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
        `from_pretrained`; of `backbone` they may set `max_sequence_length`, and `scale`, `start` and `end` of
        `controlnet`, which are arguments of the call in diffusers.

        Raises UserError, naming it, for what is not supported in a pipeline: classes other than text-to-image and
        ControlNet pipelines of the supported families, IP-Adapters, other attention processors, compiled models, and a
        safety checker or watermark, which would be skipped.
        """
        job, keys = _settings(
            BackboneConfig(), method_config(**method), scheduler, scheduler_options, original_inference_steps, overrides
        )
        given = {key for key in keys if key.startswith("backbone.")} - ARGUMENTS_OF_PIPES
        if given:
            raise UserError(f"{min(given)} cannot be set here: the backbone is the pipeline; use from_pretrained")
        with LOADING:
            borrowed = borrow(pipe, job.backbone.max_sequence_length)
        settings = Method.from_config(job.method)
        borrowed.backbone.merged_layers(settings.merging)  # raises for unknown blocks
        sampler = cls(borrowed.backbone, settings, SamplingParams.from_config(job.sampling))
        sampler._borrowed, sampler.control = borrowed, job.backbone.controlnet
        if getattr(borrowed.backbone, "controlnet", None) is None and sampler.control != ControlNetConfig():
            raise UserError("backbone.controlnet has no effect: the pipeline has no ControlNet; remove it")
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
        backbone.check_adapters()
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
                quantization=backbone.quantization,
                controlnet=backbone.controlnet.weights,
                ip_adapter=ip_adapter_files(backbone.ip_adapter),
            )
            loaded.merged_layers(settings.merging)  # raises for unknown blocks
            sampler = cls(loaded, settings, params)
            if backbone.compile:
                loaded.compile()
            if not backbone.cuda_graphs:
                loaded.disable_cuda_graphs()
            sampler.control, sampler.style_scale = backbone.controlnet, backbone.ip_adapter.scale
            return sampler

    @classmethod
    def from_job(cls, job: Job, device: str | torch.device = "cpu") -> PanoramaSampler:
        """Load the sampler of a job. It logs no warnings, which planning does."""
        require_job(job)
        sampler = cls.from_configs(job.backbone, job.method, SamplingParams.from_config(job.sampling), device)
        sampler.warns = False
        sampler.size = job.sampling.height, job.sampling.width
        collect_usually()
        return sampler

    @torch.inference_mode(False)  # a trainer may have enabled it, and SyncDiffusion needs gradients
    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_steps: Sequence[int] | None = None,
        seeds: Sequence[int],
        loop: bool | None = None,
        regions: Sequence[Sequence[Region]] | None = None,
        images: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        strength: float | None = None,
        control: Sequence[Any] | None = None,
        style: Sequence[Any] | None = None,
        decode: str | None = None,
        chunk_views: int | None = None,
        output: str = "image",
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Any:
        """Sample one panorama for each prompt, all of one size.

        Args:
            prompts: One prompt for each panorama.
            negative_prompts: One negative prompt for each panorama; None: no negative prompts.
            height: Height in pixels. None, as for width: that of the images, enlarged by `sampling.init.scale`.
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
            images: Pictures to start from instead of noise, one for each panorama: PIL images, uint8 [H, W, 3] or paths
                of files. They are resized to the panorama, or lie on it where `sampling.init.place` says.
            masks: White (255 or True) where an image is kept: PIL images, uint8 or bool [H, W] or paths of files, each
                of the size of its image. The kept part blends into the rest over `sampling.init.feather` pixels; inside
                of that it is the image. (The `mask_image` of `sampler(...)` is white where it is redrawn.)
            strength: Share of the denoising steps that run, 0..1: 0 only encodes and decodes the images, 1 starts from
                noise. Needed with images. Steps are counted from the first one that runs.
            control: A picture for each panorama, as `images`, for a backbone with a ControlNet. It is
                resized to the panorama, and each view sees its part of it.
            style: A picture for each panorama, as `images`, for a backbone with an IP-Adapter.
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
        params = parse_params(
            self.params,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            loop=loop,
            decode=decode,
            strength=strength,
        )
        given, kept = (
            None if pictures is None else one_each(name, pictures, len(prompts))
            for name, pictures in (("images", images), ("masks", masks))
        )
        pictures = parse_pictures(given, kept, (height, width), params.init)
        height, width = pictures[0].size if pictures else (height, width)
        batch = parse_batch(height, width, prompts, negative_prompts, seeds, regions)
        batch = replace(
            batch,
            pictures=pictures,
            control=parse_images("control", control, len(prompts)),
            style=parse_images("style", style, len(prompts)),
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
            return latents if output == "latent" else convert(self.decode_batch(latents, batch, params), output)


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
    keys, overrides = frozenset[str](), listed("overrides", overrides)
    if overrides:
        from madgen.config.overrides import overridden  # imports OmegaConf

        job, keys = overridden(job, overrides)
    for reason in unused_method_settings(job.method):
        logger.warning(reason)
    return job, keys


def _lora(value: Lora | Mapping[str, Any]) -> LoraConfig:
    """Convert a Lora, or `{"weights": ..., "scale": ...}`; UserError for other keys or values."""
    fields = vars(value) if isinstance(value, Lora) else value
    if not isinstance(fields, Mapping) or not {"weights"} <= set(fields) <= {"weights", "scale"}:
        raise UserError(f"a LoRA is {{weights: ..., scale: ...}}, got {value!r}")
    weights, scale = path("a LoRA's weights", fields["weights"]), number("a LoRA's scale", fields.get("scale", 1.0))
    return LoraConfig(weights=weights, scale=scale)
