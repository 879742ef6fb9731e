"""Stable Diffusion 1.x and 2.x, and Latent Consistency Models distilled from them."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec, Merging
from madgen.errors import UserError
from madgen.joint.attention import JointAttention, KeyValueCache, joint_attention
from madgen.joint.guidance import classifier_free, guidance_embedding
from madgen.joint.views import Views

PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
CONFIGS = {"model": "model_index.json", "unet": "unet/config.json", "vae": "vae/config.json"}
BLOCK_PATTERNS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}


@dataclass
class Conditioning:
    """The prompts of a batch, N = 2B paths with classifier-free guidance (negative ones first), else N = B."""

    embeddings_NTD: Tensor
    guidance_scale: float
    embedded_guidance_BD: Tensor | None = None
    cache: KeyValueCache = field(default_factory=dict)

    @property
    def paths(self) -> int:
        """How many UNet passes a view takes: N / B is 2 with classifier-free guidance."""
        return self.embeddings_NTD.shape[0]


def describe(pretrained: str, revision: str | None = None) -> BackboneSpec:
    """Reads the config files of a folder or a hub id; UserError if there is no such model."""
    model, unet, vae = (_read_config(pretrained, revision, name) for name in CONFIGS.values())
    if model.get("_class_name") not in PIPELINES:
        raise UserError(
            f"backbone.pretrained={pretrained} is a {model.get('_class_name')}; "
            f"backbone.name=sd loads {' and '.join(PIPELINES)}"
        )
    return BackboneSpec(
        channels=unet["in_channels"],
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        view_size=unet["sample_size"],
        coarsest=2 ** (len(unet["block_out_channels"]) - 1),
        guidance_embedded=unet.get("time_cond_proj_dim") is not None,
    )


def family_spec(pretrained: str) -> BackboneSpec:
    """For planning a hub id without its files: the shapes that Stable Diffusion 1.x and 2.x base models share.

    Raises UserError for what cannot be a hub id.
    """
    _check_hub_id(pretrained)
    return BackboneSpec(channels=4, factor=8, view_size=64, coarsest=8, guidance_embedded="lcm" in pretrained.lower())


def _read_config(pretrained: str, revision: str | None, name: str) -> dict[str, Any]:
    folder = Path(pretrained)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise UserError(f"backbone.pretrained={pretrained} is a folder without {name}: not a diffusers pipeline")
    else:
        path = _hub_file(pretrained, revision, name)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _hub_file(pretrained: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    _check_hub_id(pretrained)
    missing = f"backbone.pretrained={pretrained!r} is neither a folder, nor 'demo', nor a model"
    try:
        return Path(hf_hub_download(pretrained, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise UserError(f"{missing} in the local hub cache, and the hub cannot be reached from here") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{missing} that the hub gives: {str(error).strip().splitlines()[0]}") from error


def _check_hub_id(pretrained: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", pretrained, re.ASCII):
        raise UserError(
            f"backbone.pretrained={pretrained!r} is neither a folder, nor 'demo', nor a hub id (owner/name)"
        )


def load(
    pretrained: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusion:
    """Loads a diffusers folder or hub id; safetensors only, nothing is unpickled."""
    from diffusers import DiffusionPipeline

    spec = describe(pretrained, revision)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            pretrained,
            revision=revision,
            variant=variant,
            torch_dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load backbone.pretrained={pretrained}: {str(error).strip().splitlines()[0]}"
        ) from error
    return StableDiffusion(pipeline, spec, dtype, torch.device(device))


class StableDiffusion:
    """UNet, VAE, text encoder and tokenizer of one checkpoint; see `madgen.backbones.Backbone`."""

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler
        self.unet = pipeline.unet.to(device).eval().requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.to(device).eval().requires_grad_(False)
        # An fp16 VAE overflows where its config says so.
        upcast = dtype == torch.float16 and pipeline.vae.config.get("force_upcast", True)
        self.vae = (pipeline.vae.float() if upcast else pipeline.vae).to(device).eval().requires_grad_(False)
        self.layers = sorted(self.unet.attn_processors)
        self.warned_of_cuts = False
        self._refuse_unknown_attention()

    def _refuse_unknown_attention(self) -> None:
        for name, module in self.unet.named_modules():
            extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "residual_connection")
            if hasattr(module, "to_q") and any(getattr(module, extra, None) for extra in extras):
                raise UserError(f"attention layer {name} normalises its inputs in a way that sd.py does not know")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], negative_prompts: list[str], guidance_scale: float) -> Conditioning:
        """Embeddings of each prompt, and of each negative prompt where guidance takes a second pass."""
        if self.spec.guidance_embedded:
            # diffusers' convention: a guidance scale of 1 is no guidance
            weights = torch.full((len(prompts),), guidance_scale - 1)
            embedded = guidance_embedding(weights, self.unet.config.time_cond_proj_dim).to(self.device, self.dtype)
            return Conditioning(self._embed(prompts), guidance_scale, embedded)
        if guidance_scale <= 1:
            return Conditioning(self._embed(prompts), guidance_scale)
        return Conditioning(torch.cat([self._embed(negative_prompts), self._embed(prompts)]), guidance_scale)

    def _embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        self._warn_of_cuts(prompts)
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        ids = tokens.input_ids.to(self.device)
        return self.text_encoder(ids, attention_mask=None if mask is None else mask.to(self.device))[0].to(self.dtype)

    def _warn_of_cuts(self, prompts: list[str]) -> None:
        """Says once that prompts are cut: the text encoder takes so many tokens and no more."""
        most = self.tokenizer.model_max_length
        lengths = [len(ids) for ids in self.tokenizer(prompts).input_ids]
        if max(lengths) > most and not self.warned_of_cuts:
            self.warned_of_cuts = True
            cut = prompts[lengths.index(max(lengths))]
            print(f"madgen: prompts are cut to {most} tokens, the first is {cut[:60]!r} ...", file=sys.stderr)

    @contextmanager
    def merged_attention(self, views: Views, step: int, merging: Merging, conditioning: Conditioning) -> Iterator[None]:
        """Installs one processor a layer for this step and restores the others after it."""
        chosen = self.merged_layers(merging) if views.count > 1 else set()  # merging one view changes nothing
        processors = {
            name: JointAttention(name, views, name in chosen and merges(name, step, merging), conditioning.cache)
            for name in self.layers
        }
        with joint_attention(self.unet, processors):
            yield

    def merged_layers(self, merging: Merging) -> set[str]:
        """The attention layers that `merging.blocks` selects; UserError if an entry selects none."""
        chosen: set[str] = set()
        for block in merging.blocks:
            found = fnmatch.filter(self.layers, BLOCK_PATTERNS.get(block, block))
            if not found:
                raise UserError(
                    f"method.mad.blocks: {block!r} is neither down, mid, up nor a pattern of a layer such as "
                    f"{self.layers[0]!r}"
                )
            chosen.update(found)
        return chosen

    def predict_noise(self, views_BVChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """One UNet pass over all views of all paths; guidance applied, float32 [B, V, C, h, w]."""
        batch, count = views_BVChw.shape[:2]
        views = views_BVChw.to(self.dtype).repeat(conditioning.paths // batch, 1, 1, 1, 1)
        embedded = conditioning.embedded_guidance_BD
        noise = self.unet(
            views.flatten(0, 1),
            timestep,
            encoder_hidden_states=conditioning.embeddings_NTD,
            timestep_cond=None if embedded is None else embedded.repeat_interleave(count, 0),
            return_dict=False,
        )[0]
        noise = noise.float().unflatten(0, (conditioning.paths, count))
        return classifier_free(noise, conditioning.guidance_scale) if conditioning.paths > batch else noise

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Latents float32 [B, C, H / factor, W / factor], the posterior's mean, of pixels in 0..1."""
        config: Mapping[str, Any] = self.vae.config
        latents = self.vae.encode((pixels_B3HW * 2 - 1).to(self.vae.dtype)).latent_dist.mean
        return (latents.float() - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def decode(self, latents_BCHW: Tensor, wrap: int = 0) -> Tensor:
        """Pixels in 0..1, one panorama at a time, which bounds the memory.

        `wrap` > 0 is for a loop: the decoder sees that many latent cells of the other end beyond each edge.
        """
        config: Mapping[str, Any] = self.vae.config
        scaled = latents_BCHW.to(self.vae.dtype) / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        if wrap:
            wrap = min(wrap, scaled.shape[-1])
            scaled = torch.cat([scaled[..., -wrap:], scaled, scaled[..., :wrap]], dim=-1)
        pixels = torch.cat([self.vae.decode(latent[None], return_dict=False)[0].float() for latent in scaled])
        edge = wrap * self.spec.factor
        return (pixels[..., edge : pixels.shape[-1] - edge] / 2 + 0.5).clamp(0, 1)

    def new_scheduler(self, name: str | None, num_inference_steps: int) -> Any:
        """The checkpoint's own scheduler, or the diffusers class `name` made from its config."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        if name is not None:
            scheduler = scheduler_class(name).from_config(self.scheduler.config)
        check_scheduler(scheduler)
        trained = self.scheduler.config.num_train_timesteps
        if num_inference_steps > trained:
            raise UserError(
                f"sampling.num_inference_steps={num_inference_steps} is more than the {trained} of training"
            )
        try:
            scheduler.set_timesteps(num_inference_steps, device=self.device)
        except ValueError as error:
            raise UserError(f"sampling.num_inference_steps={num_inference_steps}: {error}") from error
        return scheduler


def merges(layer: str, step: int, merging: Merging) -> bool:
    """Whether a chosen layer merges at `step`; diffusers calls the cross-attention of a block `attn2`."""
    if merging.cross_attention == "always" and ".attn2." in layer:
        return True
    return step < merging.steps


def scheduler_class(name: str) -> Any:
    """A diffusers scheduler by its class name; UserError if there is none."""
    import diffusers

    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    missing = vars(found).get("_backends") if found is not None else None
    if missing:
        raise UserError(f"sampling.scheduler={name} needs packages that are not installed: {', '.join(missing)}")
    if found is None or "set_timesteps" not in dir(found):
        examples = "DDIMScheduler, EulerDiscreteScheduler"
        raise UserError(f"sampling.scheduler={name!r} is no diffusers scheduler; examples: {examples}")
    return found


def check_scheduler(scheduler: Any) -> None:
    """Refuses what cannot step a canvas, or draws noise that is not the sample's own."""
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, needed) for needed in ("init_noise_sigma", "scale_model_input", "timesteps")):
        raise UserError(f"sampling.scheduler={name} does not step a canvas of noise; take one such as DDIMScheduler")
    if hasattr(scheduler, "noise_sampler"):
        raise UserError(f"sampling.scheduler={name} draws noise that does not follow the sample's seed; take another")
