"""Stable Diffusion 1.x and 2.x, and Latent Consistency Models distilled from them."""

from __future__ import annotations

from typing import Any, Unpack

import torch

from madgen.backbones import BackboneSpec, Checkpoint
from madgen.backbones._borrowed import adopted, check_unet
from madgen.backbones._conditioning import Embedded
from madgen.backbones._loading import download, load_backbone
from madgen.backbones._schedulers import noise_evaluated_steps as evaluated_steps
from madgen.backbones._schedulers import own_scheduler, scheduler_class
from madgen.backbones._unet import (
    UNetBackbone,
    assumed_guidance,
    check_blocks,
    refuse_offload,
    refuse_sequence_length,
    unet_spec,
)
from madgen.hub import tokenizers
from madgen.hub.model_configs import check_class, read_configs, read_index
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import check_hub_id, single_file

__all__ = [
    "StableDiffusion",
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

PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")


def describe(pretrained: str, revision: str | None = None, config: str | None = None) -> BackboneSpec:
    """Read the config files of a folder, a hub id or a single file; UserError if it is not such a model."""
    check_class(read_index(pretrained, revision, config), pretrained, "sd", PIPELINES)
    _, unet, vae = read_configs(pretrained, revision, config)
    return unet_spec(unet, vae)


def family_spec(pretrained: str) -> BackboneSpec:
    """Return the shapes that Stable Diffusion 1.x and 2.x base models share, for planning without config files.

    Raises UserError if `pretrained` is neither a hub id nor a single file.
    """
    if single_file(pretrained) is None:
        check_hub_id(pretrained)
    return BackboneSpec(channels=4, factor=8, view_size=64, coarsest=8, guidance=assumed_guidance(pretrained))


def text_limit(
    pretrained: str, revision: str | None = None, config: str | None = None, max_sequence_length: int | None = None
) -> TextLimit | None:
    """Return how many tokens of a prompt are used; None if the tokenizer's files are not available locally."""
    refuse_sequence_length(max_sequence_length)
    return tokenizers.text_limit(("tokenizer",), pretrained, revision, config)


def load(pretrained: str, **checkpoint: Unpack[Checkpoint]) -> StableDiffusion:
    """Load a diffusers folder, a hub id or a single file; safetensors only, nothing is unpickled."""
    refuse_sequence_length(checkpoint.get("max_sequence_length"))
    refuse_offload(checkpoint.get("offload", "none"))
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return load_backbone(StableDiffusion, describe, pretrained, checkpoint, **options)


def adopt(pipeline: Any, max_sequence_length: int | None = None) -> StableDiffusion:
    """Build the backbone of a loaded pipeline; see `madgen.backbones._borrowed`."""
    refuse_sequence_length(max_sequence_length)
    check_unet(pipeline)
    return adopted(StableDiffusion, pipeline, pipeline.unet, unet_spec(pipeline.unet.config, pipeline.vae.config))


class StableDiffusion(UNetBackbone):
    """Stable Diffusion 1.x and 2.x: the UNet attends to the last hidden states of one text encoder."""

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        super().__init__(pipeline, spec, dtype, device)
        self.tokenizer, self.text_encoder = pipeline.tokenizer, self._frozen(pipeline.text_encoder)
        self.tokenizers = (self.tokenizer,)

    def embed(self, prompts: list[str]) -> Embedded:
        """Return the text encoder's last hidden states [N, T, D]."""
        tokens = self.token_ids(self.tokenizer, prompts)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        return Embedded(self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].to(self.dtype))
