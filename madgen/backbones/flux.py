"""FLUX.1 [dev] and [schnell]: double and single stream blocks with rotary positions, latents packed 2x2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec, Checkpoint, Guidance
from madgen.backbones._borrowed import adopted, check_parts
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._loading import download, load_backbone
from madgen.backbones._schedulers import flow_evaluated_steps as evaluated_steps
from madgen.backbones._schedulers import own_scheduler, scheduler_class
from madgen.backbones._transformer import (
    TransformerBackbone,
    canvas_ids,
    check_sequence_length,
    check_transformer_blocks,
    pack,
    read_transformer_configs,
    token_ids,
    transformer_spec,
    unpack,
)
from madgen.diffusion.views import Views
from madgen.hub import tokenizers
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import check_hub_id, single_file

__all__ = [
    "Flux",
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

PIPELINES = ("FluxPipeline",)
SEQUENCE_LENGTH = 512
"""Default of diffusers' pipeline; [schnell] was trained with 256."""
MAX_SEQUENCE_LENGTH = 512
VIEW_SIZE = 128
"""Latent cells of 1024 px; the transformer's config does not name the size that it was trained at."""


def describe(pretrained: str, revision: str | None = None, config: str | None = None) -> BackboneSpec:
    """Read the config files of a folder, a Hub id or a single file; UserError if it is not such a model."""
    _, network, vae = read_transformer_configs(pretrained, revision, config, "flux", PIPELINES)
    return _spec(network, vae)


def _spec(network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
    guidance: Guidance = "embedded" if network.get("guidance_embeds") else "none"
    return transformer_spec(vae, network["in_channels"] // 4, VIEW_SIZE, guidance)


def family_spec(pretrained: str) -> BackboneSpec:
    """Return the shapes that FLUX.1 models share, for planning without config files.

    Raises UserError if `pretrained` is neither a Hub id nor a single file.
    """
    if single_file(pretrained) is None:
        check_hub_id(pretrained)
    guidance: Guidance = "none" if "schnell" in pretrained.lower() else "embedded"
    return transformer_spec({"block_out_channels": (0,) * 4}, 16, VIEW_SIZE, guidance)


def check_blocks(
    blocks: Sequence[str], pretrained: str, revision: str | None = None, config: str | None = None
) -> None:
    """Raise UserError for an entry that selects no attention layer, from the config files alone."""
    _, network, _ = read_transformer_configs(pretrained, revision, config, "flux", PIPELINES)
    check_transformer_blocks(layer_names(network), blocks)


def layer_names(config: Mapping[str, Any]) -> list[str]:
    """Return the attention layers: double stream blocks, then single stream ones."""
    double, single = config["num_layers"], config["num_single_layers"]
    return [
        *(f"transformer_blocks.{i}.attn" for i in range(double)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(single)),
    ]


def text_limit(
    pretrained: str, revision: str | None = None, config: str | None = None, max_sequence_length: int | None = None
) -> TextLimit | None:
    """Return how many tokens of a prompt T5 reads; None if its tokenizer's files are not available locally."""
    length = check_sequence_length(max_sequence_length, SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    return tokenizers.chosen_limit("tokenizer_2", length, pretrained, revision, config)


def load(pretrained: str, **checkpoint: Unpack[Checkpoint]) -> Flux:
    """Load a diffusers folder, a Hub id or a single file; safetensors only, nothing is unpickled."""
    length = checkpoint.get("max_sequence_length")
    length = check_sequence_length(length, SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    build = partial(Flux, max_sequence_length=length, offload=checkpoint.get("offload", "none"))
    return load_backbone(build, describe, pretrained, checkpoint)


def adopt(pipeline: Any, max_sequence_length: int | None = None) -> Flux:
    """Build the backbone of a loaded pipeline; see `madgen.backbones._borrowed`."""
    check_parts(pipeline, "text_encoder", "text_encoder_2")
    length = check_sequence_length(max_sequence_length, SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH)
    network = pipeline.transformer
    return adopted(Flux, pipeline, network, _spec(network.config, pipeline.vae.config), length)


class Flux(TransformerBackbone):
    """FLUX.1: CLIP's pooled embedding, T5, and a guidance scale that is embedded ([dev]) or absent ([schnell])."""

    flow = FlowSchedule(linear_sigmas=True)
    layer_names = staticmethod(layer_names)

    def limiting_tokenizers(self) -> tuple[Any, ...]:
        """Return T5's tokenizer."""
        self.pipeline.tokenizer_2.model_max_length = self.max_sequence_length
        return (self.pipeline.tokenizer_2,)

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
            timestep=timestep.to(self.device).expand(len(cells_MChw)) / 1000,
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
