"""FLUX.1 [dev] and [schnell]: double and single stream blocks with rotary positions, latents packed 2x2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from madgen.backbones import BackboneSpec, Guidance, ModelSize
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._sizes import CLIP_L, T5_XXL, published
from madgen.backbones._tokens import canvas_ids, pack, token_ids, unpack
from madgen.backbones._transformer import TransformerBackbone
from madgen.backbones._transformer_family import VIEW_SIZE, stream_layers, transformer_spec
from madgen.backbones._vae import factor_of
from madgen.diffusion.views import Views
from madgen.hub.model_size import VAE, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Flux(TransformerBackbone):
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

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        """Read the shapes from the configs."""
        guidance: Guidance = "embedded" if network.get("guidance_embeds") else "none"
        factor = factor_of(vae)
        size = vae.get("sample_size", VIEW_SIZE * factor) // factor  # the transformer's config has none
        return transformer_spec(network["in_channels"] // 4, size, guidance, vae)

    @staticmethod
    def assumed_spec(name: str) -> BackboneSpec:
        """Return the shapes that FLUX.1 models share."""
        return transformer_spec(16, VIEW_SIZE, "none" if "schnell" in name else "embedded")

    @classmethod
    def assumed_size(cls, name: str) -> ModelSize:
        """Return the size of FLUX.1."""
        network = Parameters(11_901_408_320, 11_898_322_944, 3_065_920)
        return published(network, (CLIP_L, T5_XXL), cls.activations_of_width(3072))

    layer_names = staticmethod(stream_layers)

    def embed(self, prompt: str) -> Embedded:
        """Return T5's hidden states and CLIP's pooled embedding."""
        hidden, pooled, _ = self.pipeline.encode_prompt(
            [prompt], None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Embedded(hidden.to(self.dtype), pooled.to(self.dtype))

    def run(self, network: Any, cells_MChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer on the packed views of all paths: the velocity [M, C, h, w]."""
        assert conditioning.pooled_ND is not None
        count, (height, width) = len(cells_MChw) // conditioning.paths, cells_MChw.shape[-2:]
        guidance = conditioning.embedded_guidance_BD
        velocity: Tensor = network(
            hidden_states=pack(cells_MChw),
            timestep=timestep / 1000,
            guidance=None if guidance is None else guidance.repeat_interleave(count, 0),
            pooled_projections=conditioning.pooled_ND.repeat_interleave(count, 0),
            encoder_hidden_states=conditioning.embeddings_NTD.repeat_interleave(count, 0),
            txt_ids=self._text_ids(conditioning),
            img_ids=token_ids(height // 2, width // 2, self.device),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the rotations of prompt and canvas; see `canvas_ids`."""
        ids = canvas_ids(tokens, positions, self.device)
        return {"rotary": self.transformer.pos_embed(torch.cat([self._text_ids(conditioning), ids]))}

    def _text_ids(self, conditioning: Conditioning) -> Tensor:
        return torch.zeros(conditioning.embeddings_NTD.shape[1], 3, device=self.device)


BACKBONE = Flux
