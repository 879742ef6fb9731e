"""Stable Diffusion 3 and 3.5: a multimodal transformer with positions in the patch embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from madgen.backbones import BackboneSpec
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._sizes import CLIP_G, CLIP_L, T5_XXL
from madgen.backbones._tokens import split_positions
from madgen.backbones._transformer import TransformerBackbone
from madgen.backbones._transformer_family import has_part, transformer_size, transformer_spec
from madgen.diffusion.views import Axis, Views
from madgen.hub import tokenizers
from madgen.hub.model_configs import read_index
from madgen.hub.model_size import VAE, Parameters
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor


ENCODERS = (CLIP_L, CLIP_G, T5_XXL)


class StableDiffusion3(TransformerBackbone):
    """Stable Diffusion 3 and 3.5: two CLIP encoders, T5 if the checkpoint has it, and classifier-free guidance."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    text_encoder_parts = ("text_encoder", "text_encoder_2")
    limiting_part = "tokenizer_3"
    sequence_length = 256
    widths_alive = 13.5
    assumed_specs = {
        "3.5-medium": transformer_spec(16, 128, "cfg", max_side=768),
        "": transformer_spec(16, 128, "cfg", max_side=384),
    }
    assumed_sizes = {
        "large": transformer_size(Parameters(8_056_627_520, 8_053_694_464, 2_765_248), ENCODERS, 2432, widths_alive),
        "": transformer_size(Parameters(2_243_171_520, 2_241_822_720, 1_241_152), ENCODERS, 1536, widths_alive),
    }
    pools = True
    single_file_parts = {
        "vae": VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    }

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._own_embedding = self.transformer.pos_embed.cropped_pos_embed
        self.transformer.pos_embed.cropped_pos_embed = self._embedding

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        max_side = network["pos_embed_max_size"] * network["patch_size"]
        return transformer_spec(network["in_channels"], network["sample_size"], "cfg", vae, max_side)

    @staticmethod
    def layer_names(config: Mapping[str, Any]) -> list[str]:
        """Return the attention layers; 3.5 medium has a second one, of the image alone, in its first blocks."""
        dual = set(config.get("dual_attention_layers") or ())
        return [
            f"transformer_blocks.{i}.{name}"
            for i in range(config["num_layers"])
            for name in ("attn", "attn2")
            if name == "attn" or i in dual
        ]

    @classmethod
    def text_limit(cls, files: ModelFiles, max_sequence_length: int | None = None) -> TextLimit | None:
        """Return how many tokens of a prompt T5 reads, or CLIP if the checkpoint has no T5."""
        limit = super().text_limit(files, max_sequence_length)
        return limit or tokenizers.text_limit(("tokenizer", "tokenizer_2"), files)

    @classmethod
    def loading_options(cls, files: ModelFiles) -> dict[str, Any]:
        """Leave out T5 if the checkpoint lacks it: it is larger than the transformer."""
        index, parts = read_index(files), ("text_encoder_3", "tokenizer_3")
        return {part: None for part in parts if not has_part(files.pretrained, index, part)}

    def limited(self, max_sequence_length: int | None) -> tuple[int, tuple[Any, ...]]:
        """Return T5's tokenizer, or CLIP's if the checkpoint has no T5."""
        if self.pipeline.text_encoder_3 is None or self.pipeline.tokenizer_3 is None:
            clip = self.pipeline.tokenizer, self.pipeline.tokenizer_2
            return max_sequence_length or self.sequence_length, clip
        return super().limited(max_sequence_length)

    def embed(self, prompt: str) -> Embedded:
        """Return the hidden states of CLIP and T5, one after the other, and CLIP's pooled embeddings."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            [prompt],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Embedded(hidden.to(self.dtype), pooled.to(self.dtype))

    def run(self, network: Any, cells_MChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled_ND is not None
        count = len(cells_MChw) // conditioning.paths
        velocity: Tensor = network(
            hidden_states=cells_MChw,
            timestep=timestep,
            encoder_hidden_states=conditioning.embeddings_NTD.repeat_interleave(count, 0),
            pooled_projections=conditioning.pooled_ND.repeat_interleave(count, 0),
            return_dict=False,
        )[0]
        return velocity

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the position embeddings of the views' tokens: their part of the canvas's, or None for their own."""
        if positions == "local":
            return {}
        patch, axes = self.spec.patch, (tokens.rows, tokens.columns)
        height, width = (axis.extent if positions == "canvas" else axis.size for axis in axes)
        table = self._own_embedding(height * patch, width * patch).unflatten(1, (height, width))
        if positions == "fit":
            table = _stretched(_stretched(table, tokens.rows, 1), tokens.columns, 2)
        places = split_positions(table, tokens)
        return {"embedding": places.repeat(conditioning.paths, 1, 1)}

    def _embedding(self, height: int, width: int) -> Tensor:
        """Return the position embeddings of the running pass: those of `place`, or the transformer's own."""
        running = self.context.current
        if running is not None and running.embedding is not None:
            return running.embedding
        own: Tensor = self._own_embedding(height, width)
        return own


def _stretched(table_1HWD: Tensor, axis: Axis, dim: int) -> Tensor:
    """Interpolate positions of a view, so that the canvas's tokens lie within its range."""
    places = torch.arange(axis.extent, device=table_1HWD.device, dtype=torch.float32) * (axis.size / axis.extent)
    below = places.floor().long()
    above = (below + 1).clamp(max=axis.size - 1)
    shape = [1] * table_1HWD.ndim
    shape[dim] = axis.extent
    share = (places - below).view(shape).to(table_1HWD.dtype)
    return torch.lerp(table_1HWD.index_select(dim, below), table_1HWD.index_select(dim, above), share)


BACKBONE = StableDiffusion3
