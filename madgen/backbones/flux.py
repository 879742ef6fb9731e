"""FLUX.1 [dev] and [schnell]: double and single stream blocks with rotary positions, latents packed 2x2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from madgen.backbones import BackboneSpec, Guidance
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._sizes import CLIP_L, T5_XXL
from madgen.backbones._tokens import canvas_ids, token_ids
from madgen.backbones._transformer import PackedTransformerBackbone
from madgen.backbones._transformer_family import VIEW_SIZE, stream_layers, transformer_size, transformer_spec
from madgen.backbones._vae import factor_of
from madgen.diffusion.views import Views
from madgen.hub.model_size import VAE, Parameters


class Flux(PackedTransformerBackbone):
    """FLUX.1: CLIP's pooled embedding, T5, and a guidance scale that is embedded ([dev]) or absent ([schnell])."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    text_encoder_parts = ("text_encoder", "text_encoder_2")
    limiting_part = "tokenizer_2"
    sequence_length = 512  # [schnell] was trained with 256
    pools = True
    single_file_parts = {
        "vae": VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    }
    flow = FlowSchedule(linear_sigmas=True)
    widths_alive = 18.0
    assumed_specs = {
        "schnell": transformer_spec(16, VIEW_SIZE, "none"),
        "": transformer_spec(16, VIEW_SIZE, "embedded"),
    }
    assumed_sizes = {
        "": transformer_size(
            Parameters(11_901_408_320, 11_898_322_944, 3_065_920), (CLIP_L, T5_XXL), 3072, widths_alive
        )
    }

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        guidance: Guidance = "embedded" if network.get("guidance_embeds") else "none"
        factor = factor_of(vae)
        size = vae.get("sample_size", VIEW_SIZE * factor) // factor  # the transformer's config has none
        return transformer_spec(network["in_channels"] // 4, size, guidance, vae)

    layer_names = staticmethod(stream_layers)

    def embed(self, prompt: str) -> Embedded:
        """Return T5's hidden states and CLIP's pooled embedding."""
        hidden, pooled, _ = self.pipeline.encode_prompt(
            [prompt], None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Embedded(hidden.to(self.dtype), pooled.to(self.dtype))

    def inputs(self, conditioning: Conditioning, views: int, height: int, width: int) -> dict[str, Any]:
        """Return the guidance, the pooled prompts and the positions."""
        assert conditioning.pooled_ND is not None
        guidance = conditioning.embedded_guidance_BD
        return {
            "guidance": None if guidance is None else guidance.repeat_interleave(views, 0),
            "pooled_projections": conditioning.pooled_ND.repeat_interleave(views, 0),
            "txt_ids": self._text_ids(conditioning),
            "img_ids": token_ids(height, width, self.device),
        }

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the rotations of prompt and canvas; see `canvas_ids`."""
        ids = canvas_ids(tokens, positions, self.device)
        return {"rotary": self.transformer.pos_embed(torch.cat([self._text_ids(conditioning), ids]))}

    def _text_ids(self, conditioning: Conditioning) -> torch.Tensor:
        return torch.zeros(conditioning.embeddings_NTD.shape[1], 3, device=self.device)


BACKBONE = Flux
