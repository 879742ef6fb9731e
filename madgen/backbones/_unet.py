"""What Stable Diffusion models with a UNet share: joint attention, noise prediction, guidance and decoding."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec, Merging, _schedulers, _vae
from madgen.errors import UserError
from madgen.joint.attention import JointAttention, KeyValueCache, joint_attention
from madgen.joint.guidance import classifier_free, guidance_embedding
from madgen.joint.views import Views

BLOCK_PATTERNS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}


def unet_spec(unet: dict[str, Any], vae: dict[str, Any]) -> BackboneSpec:
    """The shapes that the config files of a UNet and its VAE tell."""
    return BackboneSpec(
        channels=unet["in_channels"],
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        view_size=unet["sample_size"],
        coarsest=2 ** (len(unet["block_out_channels"]) - 1),
        guidance_embedded=unet.get("time_cond_proj_dim") is not None,
    )


@dataclass(frozen=True)
class Embedded:
    """Prompts as the UNet takes them: the text encoders' hidden states, and their summary where it takes one."""

    hidden_NTD: Tensor
    pooled_ND: Tensor | None = None


@dataclass
class Conditioning:
    """The prompts of a batch, N = 2B paths with classifier-free guidance (negative ones first), else N = B."""

    embeddings_NTD: Tensor
    guidance_scale: float
    embedded_guidance_BD: Tensor | None = None
    pooled_ND: Tensor | None = None
    cache: KeyValueCache = field(default_factory=dict)

    @property
    def paths(self) -> int:
        """How many UNet passes a view takes: N / B is 2 with classifier-free guidance."""
        return self.embeddings_NTD.shape[0]


class UNetBackbone:
    """UNet, VAE, text encoders and tokenizers of one checkpoint; see `madgen.backbones.Backbone`.

    A subclass says how prompts are embedded, and what else the UNet is told of a view.
    """

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.scheduler = pipeline.scheduler
        self.unet = self._frozen(pipeline.unet)
        # An fp16 VAE overflows where its config says so.
        upcast = dtype == torch.float16 and pipeline.vae.config.get("force_upcast", True)
        self.vae = self._frozen(pipeline.vae.float() if upcast else pipeline.vae)
        self.layers = sorted(self.unet.attn_processors)
        self.warned_of_cuts = False
        self._refuse_unknown_attention()

    def _frozen(self, model: Any) -> Any:
        return model.to(self.device).eval().requires_grad_(False)

    def _refuse_unknown_attention(self) -> None:
        for name, module in self.unet.named_modules():
            extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "residual_connection")
            if hasattr(module, "to_q") and any(getattr(module, extra, None) for extra in extras):
                raise UserError(f"attention layer {name} normalises its inputs in a way that is not known here")

    def embed(self, prompts: list[str]) -> Embedded:
        """The prompts in the UNet's dtype."""
        raise NotImplementedError

    def embed_negative(self, prompts: list[str]) -> Embedded:
        """Negative prompts, the empty one included."""
        return self.embed(prompts)

    def view_conditions(
        self, conditioning: Conditioning, count: int, height: int, width: int
    ) -> dict[str, Tensor] | None:
        """What the UNet is told beside the prompt of each of [N * `count`] views of `height` x `width` cells."""
        return None

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], negative_prompts: list[str], guidance_scale: float) -> Conditioning:
        """Embeddings of each prompt, and of each negative prompt where guidance takes a second pass."""
        paths, embedded = [self.embed(prompts)], None
        if self.spec.guidance_embedded:
            # diffusers' convention: a guidance scale of 1 is no guidance
            weights = torch.full((len(prompts),), guidance_scale - 1)
            embedded = guidance_embedding(weights, self.unet.config.time_cond_proj_dim).to(self.device, self.dtype)
        elif guidance_scale > 1:
            paths.insert(0, self.embed_negative(negative_prompts))
        hidden = torch.cat([path.hidden_NTD for path in paths])
        pooled = [path.pooled_ND for path in paths if path.pooled_ND is not None]
        return Conditioning(hidden, guidance_scale, embedded, torch.cat(pooled) if pooled else None)

    def token_ids(self, tokenizer: Any, prompts: list[str]) -> Any:
        """The tokenizer's output for prompts of full length; says once if it cuts one."""
        most = tokenizer.model_max_length
        self._warn_of_cuts(prompts, [len(ids) for ids in tokenizer(prompts).input_ids], most)
        return tokenizer(prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")

    def _warn_of_cuts(self, prompts: list[str], lengths: list[int], most: int) -> None:
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
        batch, count, _, height, width = views_BVChw.shape
        views = views_BVChw.to(self.dtype).repeat(conditioning.paths // batch, 1, 1, 1, 1)
        embedded = conditioning.embedded_guidance_BD
        noise = self.unet(
            views.flatten(0, 1),
            timestep,
            encoder_hidden_states=conditioning.embeddings_NTD,
            timestep_cond=None if embedded is None else embedded.repeat_interleave(count, 0),
            added_cond_kwargs=self.view_conditions(conditioning, count, height, width),
            return_dict=False,
        )[0]
        noise = noise.float().unflatten(0, (conditioning.paths, count))
        return classifier_free(noise, conditioning.guidance_scale) if conditioning.paths > batch else noise

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Pixels in 0..1, float32; `tiled` in tiles of at most two views' cells a side. See `_vae.decode`."""
        tile = 2 * self.spec.view_size if tiled else None
        return _vae.decode(self.vae, self.spec.factor, latents_BCHW, wrap, tile)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Latents float32 [B, C, H / factor, W / factor] of pixels in 0..1."""
        return _vae.encode(self.vae, pixels_B3HW)

    def new_scheduler(
        self, name: str | None, num_inference_steps: int, original_inference_steps: int | None = None
    ) -> Any:
        """The checkpoint's own scheduler, or the diffusers class `name` made from its config."""
        return _schedulers.new_scheduler(
            self.scheduler, name, num_inference_steps, original_inference_steps, self.device
        )


def merges(layer: str, step: int, merging: Merging) -> bool:
    """Whether a chosen layer merges at `step`; diffusers calls the cross-attention of a block `attn2`."""
    if merging.cross_attention == "always" and ".attn2." in layer:
        return True
    return step < merging.steps
