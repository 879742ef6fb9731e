"""`sampler(...)`: the names and semantics of `DiffusionPipeline.__call__`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madgen.backbones import PromptEmbeddings
from madgen.config.schema import InitConfig, SamplingParams
from madgen.diffusion.denoise import Generators
from madgen.sampling.call_inputs import CallInputs
from madgen.sampling.inputs import PanoramaBatch, parse_batch, parse_params
from madgen.sampling.joint_sampler import JointSampler
from madgen.sampling.picture_arguments import kept_by, parse_images, parse_pictures, repeated
from madgen.sampling.postprocess import check_output, convert
from madgen.types import Region
from madgen.utils.errors import UserError
from madgen.utils.validation import listed, switch, texts, whole, whole_or_none

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
"""`callback(sampler, step, timestep, {"latents": ...})`, as diffusers calls it; may return `{"latents": ...}`."""
OUTPUTS = ("pil", "np", "pt", "latent")
UNSUPPORTED = {
    "images": "use image=picture, or sampler.sample(prompts, images=[picture], strength=..., seeds=[...])",
    "masks": "use mask_image=mask, white where the image is redrawn, or sampler.sample(prompts, masks=[mask], ...)",
    "control": "use control_image=picture, or sampler.sample(prompts, control=[picture], seeds=[...])",
    "style": "use ip_adapter_image=picture, or sampler.sample(prompts, style=[picture], seeds=[...])",
    "masked_image_latents": "pass image and mask_image",
    "padding_mask_crop": "crop image and mask_image, and paste the result",
    "ip_adapter_image_embeds": "pass ip_adapter_image",
    "controlnet_conditioning_scale": 'set it by overrides=["backbone.controlnet.scale=..."]',
    "control_guidance_start": 'set it by overrides=["backbone.controlnet.start=..."]',
    "control_guidance_end": 'set it by overrides=["backbone.controlnet.end=..."]',
    "guess_mode": "guess mode is not supported; lower guidance_scale, or the scale of the ControlNet",
    "cross_attention_kwargs": "scale a LoRA by pipe.set_adapters(...) and use PanoramaSampler.from_pipe(pipe)",
    "clip_skip": "encode the prompt with pipe.encode_prompt(..., clip_skip=...) and pass prompt_embeds",
    "guidance_rescale": "the guidance is not rescaled; lower guidance_scale",
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end",
    "prompt_2": "both text encoders get the same prompt; pass prompt_embeds for different ones",
    "negative_prompt_2": "both text encoders get the same prompt; pass negative_prompt_embeds for different ones",
    "prompt_3": "all text encoders get the same prompt; pass prompt_embeds for different ones",
    "negative_prompt_3": "all text encoders get the same prompt; pass negative_prompt_embeds for different ones",
    "max_sequence_length": 'set it by overrides=["backbone.max_sequence_length=..."] when the sampler is created',
    "true_cfg_scale": "guidance_scale is the guidance of each model; it is Qwen-Image's true_cfg_scale",
    "joint_attention_kwargs": "scale a LoRA by pipe.set_adapters(...) and use PanoramaSampler.from_pipe(pipe)",
    "denoising_end": "denoising runs to the end",
    "original_size": "each view is conditioned as an uncropped image of its size",
    "target_size": "each view is conditioned as an uncropped image of its size",
    "crops_coords_top_left": "each view is conditioned as an uncropped image of its size",
    "original_inference_steps": "pass it to PanoramaSampler.from_pretrained or from_pipe",
    "seed": "use generator=torch.Generator().manual_seed(seed), or sampler.sample(..., seeds=[seed])",
    "seeds": "use generator=[torch.Generator().manual_seed(seed) for seed in seeds], or sampler.sample(...)",
}
"""Arguments of diffusers' pipelines that `PanoramaSampler` does not take, and what to do instead."""
_FROM_PIPE = "set up the pipeline and use PanoramaSampler.from_pipe(pipe)"
_DECODE = 'decode="tiled" in the call limits the memory of decoding'
ATTRIBUTES = {
    "to": 'choose the device when the sampler is created: from_pretrained(..., device="cuda")',
    "unet": _FROM_PIPE,
    "transformer": _FROM_PIPE,
    "vae": "sampler.decode(latents) decodes; " + _FROM_PIPE,
    "load_lora_weights": 'use from_pretrained(..., loras=[{"weights": file, "scale": 1.0}]), or ' + _FROM_PIPE,
    "load_ip_adapter": 'use from_pretrained(..., overrides=["backbone.ip_adapter={weights: ..., weight_name: ...}"])',
    "enable_model_cpu_offload": _FROM_PIPE,
    "enable_sequential_cpu_offload": _FROM_PIPE,
    "enable_vae_tiling": _DECODE,
    "enable_vae_slicing": _DECODE,
    "enable_attention_slicing": "chunk_views in the call limits the number of views of a pass",
    "enable_xformers_memory_efficient_attention": "PyTorch's fused attention is used",
}
"""Attributes of diffusers' pipelines that `PanoramaSampler` does not have, and what to do instead."""
LOADING_ARGUMENTS = {
    "torch_dtype": 'use dtype="bfloat16"',
    "safety_checker": "the sampler has none; a job's safety.checker checks panoramas",
    "use_safetensors": "only safetensors files are loaded",
    "device_map": 'use device="cuda", or ' + _FROM_PIPE,
    "quantization_config": 'use overrides=["backbone.quantization=int8"], or ' + _FROM_PIPE,
}
"""Arguments of `DiffusionPipeline.from_pretrained` that `PanoramaSampler` does not take, and what to do instead."""


class PanoramaOutput(NamedTuple):
    """The result of `sampler(...)`."""

    images: Any
    """List of `PIL.Image.Image`, NumPy array or tensor, depending on `output_type`."""


class _InterruptError(Exception):
    """Ends the denoising after a callback has set `_interrupt`."""

    def __init__(self, latents_BCHW: Tensor):
        super().__init__()
        self.latents_BCHW = latents_BCHW


class DiffusersCall(JointSampler):
    """Add `sampler(...)` and the progress bar of a diffusers pipeline."""

    _callback_tensor_inputs = ("latents",)
    _interrupt = False
    _guidance_scale = 0.0
    _progress_bar_config: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        instead = f": {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{instead}", name=name, obj=self)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current call."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the current call ends after this step; set by a callback through `sampler._interrupt = True`."""
        return self._interrupt

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Set arguments of the tqdm bar of `sampler(...)`, such as `disable=True`."""
        self._progress_bar_config = kwargs

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Return a tqdm bar, in notebooks a widget."""
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._progress_bar_config)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_steps: Sequence[int] | None = None,
        loop: bool | None = None,
        regions: Sequence[Sequence[Region]] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        control_image: Any = None,
        ip_adapter_image: Any = None,
        decode: str | None = None,
        chunk_views: int | None = None,
        **unsupported: Any,
    ) -> PanoramaOutput:
        """Sample panoramas, with the arguments of diffusers' text-to-image, image-to-image and inpainting pipelines.

        With `layout="whole"` and MAD off, the images are those of the pipeline itself for the same generator.

        Args:
            prompt: One prompt or a list of prompts.
            height: Height in pixels. Default: one view, the size that the backbone was trained at.
            width: Width in pixels. Default: that of the backbone's preset, such as 3072 for Stable Diffusion.
            num_inference_steps: Number of denoising steps. Default: `sampling.num_inference_steps`.
            timesteps: Timesteps in descending order, for schedulers that take them, in place of num_inference_steps.
            sigmas: Sigmas in descending order, for schedulers that take them, in place of num_inference_steps.
            guidance_scale: Weight of classifier-free guidance. Default: `sampling.guidance_scale`.
            negative_prompt: One for all prompts, or one for each.
            num_images_per_prompt: Number of panoramas of each prompt, one after the other in the result.
            eta: Parameter of DDIMScheduler.
            generator: Generator of the noise, or one for each panorama. Default: PyTorch's default generator.
            latents: Noise [B, C, height/f, width/f] in place of that of the generator.
            prompt_embeds: Encoded prompts [B, T, D] in place of prompt.
            negative_prompt_embeds: Encoded negative prompts [B, T, D] in place of negative_prompt.
            pooled_prompt_embeds: Pooled encoded prompts [B, P], needed with prompt_embeds by Stable Diffusion XL.
            negative_pooled_prompt_embeds: Pooled encoded negative prompts [B, P].
            output_type: `pil`, `np` (float32 [B, height, width, 3] in 0..1), `pt` (float32 [B, 3, height, width] in
                0..1) or `latent`.
            return_dict: No effect: the result is a tuple with the field `images`.
            callback_on_step_end: Called as `callback(sampler, step, timestep, {"latents": latents})` after each step;
                the latents that it returns replace these. `sampler._interrupt = True` ends the denoising.
            callback_on_step_end_tensor_inputs: Only `latents` are available.
            guidance_steps: See `sample`, like all arguments that diffusers does not have.
            loop: See `sample`.
            regions: See `sample`.
            image: Picture to start from instead of noise, or a list of one for each prompt: PIL images, uint8 [H, W, 3]
                or paths of files. The default size is that of the picture, enlarged by `sampling.init.scale`.
            mask_image: White where the image is redrawn, as in diffusers; black parts are kept, pixel by pixel.
            strength: Share of the denoising steps that run, 0..1. Default: `sampling.init.strength`, or else as in
                diffusers 0.8, and 1 if a part of the image is kept.
            control_image: Picture that a ControlNet follows, or a list of one for each prompt.
            ip_adapter_image: Picture that an IP-Adapter follows, or a list of one for each prompt.
            decode: See `sample`.
            chunk_views: See `sample`.

        Raises:
            UserError: for impossible sizes and settings; it is a ValueError.
        """
        refuse(unsupported, "__call__", UNSUPPORTED)
        _check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_output("output_type", output_type, OUTPUTS)
        switch("return_dict", return_dict)
        embeddings = PromptEmbeddings(
            prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds
        )
        inputs = CallInputs.parse(generator, latents, embeddings, timesteps, sigmas, eta)
        prompts, negatives = _texts(prompt, negative_prompt, inputs)
        copies = whole("num_images_per_prompt", num_images_per_prompt, 1)
        inputs = inputs.repeated(copies, len(prompts), self.dtype)
        params = parse_params(
            self.params,
            num_inference_steps=num_inference_steps if inputs.steps is None else inputs.steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            loop=loop,
            decode=decode,
            strength=_strength(self.params.init, strength, image, mask_image),
        )
        if image is None and mask_image is not None:
            raise UserError("mask_image needs an image, whose black parts it keeps; pass image")
        images = None if image is None else repeated("image", image, len(prompts))
        masks = mask_image
        if mask_image is not None:
            masks = [kept_by(mask) for mask in repeated("mask_image", mask_image, len(prompts))]
        control = parse_images("control_image", control_image, len(prompts), repeated)
        style = parse_images("ip_adapter_image", ip_adapter_image, len(prompts), repeated)
        pictures = parse_pictures(images, masks, (height, width), params.init, "image")
        default_height, default_width = pictures[0].size if pictures else self.default_size
        batch = parse_batch(
            default_height if height is None else height,
            default_width if width is None else width,
            _repeated(prompts, copies),
            _repeated(negatives, copies),
            inputs.seeds(len(prompts) * copies),
            None if regions is None else _repeated(listed("regions", regions), copies),
        )
        batch = replace(
            batch,
            inputs=inputs,
            pictures=_repeated(pictures, copies),
            control=None if control is None else _repeated(control, copies),
            style=None if style is None else _repeated(style, copies),
        )
        chunk_views = whole_or_none("chunk_views", chunk_views, 1)
        steps = params.denoising_steps(self.backbone.spec.joint_attention)
        with self.exclusively(), self.progress_bar(total=steps) as bar:
            latents = self._sample_interruptibly(batch, params, chunk_views, callback_on_step_end, bar)
            if output_type == "latent":
                return PanoramaOutput(latents)
            return PanoramaOutput(convert(self.decode_batch(latents, batch, params), output_type))

    def _sample_interruptibly(
        self,
        batch: PanoramaBatch,
        params: SamplingParams,
        chunk_views: int | None,
        callback: StepCallback | None,
        bar: Any,
    ) -> Tensor:
        """Sample latents; if the callback interrupts the call, those of the last step. Moves the progress bar."""
        self._interrupt, self._guidance_scale = False, params.guidance_scale
        evaluations = count()

        def on_step(step: int, timestep: Tensor, latents_BCHW: Tensor) -> Tensor:
            bar.update(step + 1 - bar.n)
            if callback is not None:
                result = callback(self, next(evaluations), timestep, {"latents": latents_BCHW})
                latents_BCHW = _returned_latents(result or {}, latents_BCHW)
            if self.interrupt:
                raise _InterruptError(latents_BCHW)
            return latents_BCHW

        try:
            return self.sample_latents(batch, params, chunk_views, on_step)
        except _InterruptError as interruption:
            return interruption.latents_BCHW


def _strength(init: InitConfig, strength: Any, image: Any, mask_image: Any) -> Any:
    """Return the strength of a call: None is that of the sampler."""
    if strength is not None or image is None or init.strength is not None:
        return strength
    return init.default_strength(mask_image is not None)


def _returned_latents(result: Mapping[str, Any], latents_BCHW: Tensor) -> Tensor:
    """Return the latents that a callback has returned, by default those that it was called with."""
    if unknown := sorted(set(result) - {"latents"}):
        raise UserError(f"callback_on_step_end may return new latents only, got {', '.join(unknown)}")
    latents = result.get("latents", latents_BCHW)
    if not isinstance(latents, Tensor) or latents.shape != latents_BCHW.shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"callback_on_step_end must return latents of shape {tuple(latents_BCHW.shape)}, got {got}")
    return latents.to(latents_BCHW)


def refuse(arguments: Mapping[str, Any], method: str, known: Mapping[str, str]) -> None:
    """Raise UserError for arguments of diffusers' method that ours does not take, TypeError for unknown ones."""
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(f"PanoramaSampler.{method}() got an unexpected keyword argument {name!r}")
        if value is not None:
            raise UserError(f"{name} is not supported: {known[name]}")


def _check_callback(callback: Any, tensor_inputs: Any) -> None:
    if callback is not None and not callable(callback):
        raise UserError(f"callback_on_step_end must be a function, got {callback!r}")
    names = getattr(callback, "tensor_inputs", None) or texts(
        "callback_on_step_end_tensor_inputs", tensor_inputs
    )  # diffusers' PipelineCallback names its own
    if other := [name for name in names if name != "latents"]:
        raise UserError(
            f"callback_on_step_end_tensor_inputs: only 'latents' are available, got {other[0]!r}; guidance_steps ends "
            "the guidance early"
        )


def _texts(prompt: Any, negative_prompt: Any, inputs: CallInputs) -> tuple[list[str], list[str]]:
    """Return the prompts and negative prompts, empty where embeddings replace them."""
    for name, value, embedded in (
        ("prompt", prompt, inputs.embeddings.prompt_embeds),
        ("negative_prompt", negative_prompt, inputs.embeddings.negative_prompt_embeds),
    ):
        if value is not None and embedded is not None:
            raise UserError(f"pass either {name} or {name}_embeds, not both")
    if prompt is None and inputs.embeddings.prompt_embeds is None:
        raise UserError("pass a prompt or prompt_embeds")
    if inputs.embeddings.prompt_embeds is not None:
        prompts = [""] * len(inputs.embeddings.prompt_embeds)
    else:
        prompts = [prompt] if isinstance(prompt, str) else texts("prompt", prompt)
    if negative_prompt is None or isinstance(negative_prompt, str):
        return prompts, [negative_prompt or ""] * len(prompts)
    negatives = texts("negative_prompt", negative_prompt)
    if len(negatives) != len(prompts):
        raise UserError(
            f"negative_prompt must be one text or {len(prompts)}, one for each prompt, got {len(negatives)}"
        )
    return prompts, negatives


def _repeated(items: list[Any], copies: int) -> list[Any]:
    return [item for item in items for _ in range(copies)]
