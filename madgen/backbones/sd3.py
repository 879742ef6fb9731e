"""Stable Diffusion 3 and 3.5: a multimodal transformer with positions in the patch embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec, Checkpoint
from madgen.backbones._borrowed import adopted, check_parts
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._loading import download, load_backbone
from madgen.backbones._schedulers import flow_evaluated_steps as evaluated_steps
from madgen.backbones._schedulers import own_scheduler, scheduler_class
from madgen.backbones._transformer import (
    TransformerBackbone,
    check_sequence_length,
    check_transformer_blocks,
    has_part,
    read_transformer_configs,
    split_positions,
    transformer_spec,
)
from madgen.diffusion.views import Axis, Views
from madgen.hub import tokenizers
from madgen.hub.model_configs import read_index
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import check_hub_id, single_file

__all__ = [
    "StableDiffusion3",
    "adopt",
    "check_blocks",
    "describe",
    "download",
    "evaluated_steps",
    "family_spec",
    "load",
    "own_scheduler",
    "scheduler_class",
    "text_limit",
]

PIPELINES = ("StableDiffusion3Pipeline",)
SEQUENCE_LENGTH = 256
"""Default of diffusers' pipeline."""
MAX_SEQUENCE_LENGTH = 512


def describe(pretrained: str, revision: str | None = None, config: str | None = None) -> BackboneSpec:
    """Read the config files of a folder, a Hub id or a single file; UserError if it is not such a model."""
    _, network, vae = read_transformer_configs(pretrained, revision, config, "sd3", PIPELINES)
    return _spec(network, vae)


def _spec(network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
    max_side = network["pos_embed_max_size"] * network["patch_size"]
    return transformer_spec(vae, network["in_channels"], network["sample_size"], "cfg", max_side)


def family_spec(pretrained: str) -> BackboneSpec:
    """Return the shapes that Stable Diffusion 3 and 3.5 share, for planning without config files.

    Raises UserError if `pretrained` is neither a Hub id nor a single file.
    """
    if single_file(pretrained) is None:
        check_hub_id(pretrained)
    return transformer_spec(
        {"block_out_channels": (0,) * 4}, 16, 128, "cfg", 768 if "3.5-medium" in pretrained else 384
    )


def check_blocks(
    blocks: Sequence[str], pretrained: str, revision: str | None = None, config: str | None = None
) -> None:
    """Raise UserError for an entry that selects no attention layer, from the config files alone."""
    _, network, _ = read_transformer_configs(pretrained, revision, config, "sd3", PIPELINES)
    check_transformer_blocks(layer_names(network), blocks)


def layer_names(config: Mapping[str, Any]) -> list[str]:
    """Return the attention layers; 3.5 medium has a second one, of the image alone, in its first blocks."""
    dual = set(config.get("dual_attention_layers") or ())
    blocks = range(config["num_layers"])
    return [
        f"transformer_blocks.{i}.{name}" for i in blocks for name in ("attn", "attn2") if name == "attn" or i in dual
    ]


def text_limit(
    pretrained: str, revision: str | None = None, config: str | None = None, max_sequence_length: int | None = None
) -> TextLimit | None:
    """Return how many tokens of a prompt are used: those that T5 reads, or CLIP's if the checkpoint has no T5."""
    length = check_sequence_length(max_sequence_length, SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    limit = tokenizers.chosen_limit("tokenizer_3", length, pretrained, revision, config)
    return limit or tokenizers.text_limit(("tokenizer", "tokenizer_2"), pretrained, revision, config)


def load(pretrained: str, **checkpoint: Unpack[Checkpoint]) -> StableDiffusion3:
    """Load a diffusers folder, a Hub id or a single file; safetensors only, nothing is unpickled."""
    length = checkpoint.get("max_sequence_length")
    length = check_sequence_length(length, SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    build = partial(StableDiffusion3, max_sequence_length=length, offload=checkpoint.get("offload", "none"))
    index = read_index(pretrained, checkpoint.get("revision"), checkpoint.get("config"))
    # Checkpoints without T5 are common: it is larger than the transformer.
    missing = {part: None for part in ("text_encoder_3", "tokenizer_3") if not has_part(pretrained, index, part)}
    return load_backbone(build, describe, pretrained, checkpoint, **missing)


def adopt(pipeline: Any, max_sequence_length: int | None = None) -> StableDiffusion3:
    """Build the backbone of a loaded pipeline; see `madgen.backbones._borrowed`."""
    check_parts(pipeline, "text_encoder", "text_encoder_2")
    length = check_sequence_length(max_sequence_length, SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    network = pipeline.transformer
    return adopted(StableDiffusion3, pipeline, network, _spec(network.config, pipeline.vae.config), length)


class StableDiffusion3(TransformerBackbone):
    """Stable Diffusion 3 and 3.5: two CLIP encoders, T5 if the checkpoint has it, and classifier-free guidance."""

    layer_names = staticmethod(layer_names)

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._own_embedding = self.transformer.pos_embed.cropped_pos_embed
        self.transformer.pos_embed.cropped_pos_embed = self._embedding

    def limiting_tokenizers(self) -> tuple[Any, ...]:
        """Return T5's tokenizer, or CLIP's if the checkpoint has no T5."""
        if self.pipeline.text_encoder_3 is None or self.pipeline.tokenizer_3 is None:
            return self.pipeline.tokenizer, self.pipeline.tokenizer_2
        self.pipeline.tokenizer_3.model_max_length = self.max_sequence_length
        return (self.pipeline.tokenizer_3,)

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
        """Run the transformer on the views of all paths: the velocity [M, C, h, w]."""
        assert conditioning.pooled_ND is not None
        count = len(cells_MChw) // conditioning.paths
        velocity: Tensor = network(
            hidden_states=cells_MChw,
            timestep=timestep.to(self.device).expand(len(cells_MChw)),
            encoder_hidden_states=conditioning.embeddings_NTD.repeat_interleave(count, 0),
            pooled_projections=conditioning.pooled_ND.repeat_interleave(count, 0),
            return_dict=False,
        )[0]
        return velocity

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the position embeddings of the views' tokens: their part of the canvas's, or None for their own."""
        if positions == "local":
            return {}
        patch = self.spec.patch
        if positions == "canvas":
            table = self._own_embedding(tokens.rows.extent * patch, tokens.columns.extent * patch)
            table = table.unflatten(1, (tokens.rows.extent, tokens.columns.extent))
        else:
            table = self._own_embedding(tokens.rows.size * patch, tokens.columns.size * patch)
            table = table.unflatten(1, (tokens.rows.size, tokens.columns.size))
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
