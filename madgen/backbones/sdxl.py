"""Stable Diffusion XL base: two text encoders, and a UNet conditioned on the image size."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec, Checkpoint
from madgen.backbones._borrowed import adopted, check_unet
from madgen.backbones._conditioning import Conditioning, Embedded
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
from madgen.utils.errors import UserError

__all__ = [
    "StableDiffusionXL",
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

PIPELINES = ("StableDiffusionXLPipeline",)


def describe(pretrained: str, revision: str | None = None, config: str | None = None) -> BackboneSpec:
    """Read the config files of a folder, a hub id or a single file; UserError if it is not such a model."""
    model = read_index(pretrained, revision, config)
    if model.get("requires_aesthetics_score"):
        raise UserError(f"backbone.pretrained={pretrained} is a refiner; backbone.name=sdxl loads the base model")
    check_class(model, pretrained, "sdxl", PIPELINES)
    _, unet, vae = read_configs(pretrained, revision, config)
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(
            f"backbone.pretrained={pretrained}: the UNet's addition_embed_type is {unet.get('addition_embed_type')}; "
            "backbone.name=sdxl supports text_time"
        )
    return unet_spec(unet, vae)


def family_spec(pretrained: str) -> BackboneSpec:
    """Return the shapes that Stable Diffusion XL base models share, for planning without config files.

    Raises UserError if `pretrained` is neither a hub id nor a single file.
    """
    if single_file(pretrained) is None:
        check_hub_id(pretrained)
    return BackboneSpec(channels=4, factor=8, view_size=128, coarsest=4, guidance=assumed_guidance(pretrained))


def text_limit(
    pretrained: str, revision: str | None = None, config: str | None = None, max_sequence_length: int | None = None
) -> TextLimit | None:
    """Return how many tokens of a prompt are used; None if the tokenizer's files are not available locally."""
    refuse_sequence_length(max_sequence_length)
    return tokenizers.text_limit(("tokenizer", "tokenizer_2"), pretrained, revision, config)


def load(pretrained: str, **checkpoint: Unpack[Checkpoint]) -> StableDiffusionXL:
    """Load a diffusers folder, a hub id or a single file; safetensors only, nothing is unpickled."""
    refuse_sequence_length(checkpoint.get("max_sequence_length"))
    refuse_offload(checkpoint.get("offload", "none"))
    options = {"add_watermarker": False}
    return load_backbone(StableDiffusionXL, describe, pretrained, checkpoint, **options)


def adopt(pipeline: Any, max_sequence_length: int | None = None) -> StableDiffusionXL:
    """Build the backbone of a loaded pipeline; see `madgen.backbones._borrowed`."""
    refuse_sequence_length(max_sequence_length)
    check_unet(pipeline)
    if pipeline.config.get("requires_aesthetics_score"):
        raise UserError("pipe: a refiner is not supported; load the base model")
    return adopted(StableDiffusionXL, pipeline, pipeline.unet, unet_spec(pipeline.unet.config, pipeline.vae.config))


class StableDiffusionXL(UNetBackbone):
    """Stable Diffusion XL: the UNet attends to the concatenated penultimate hidden states of both text encoders."""

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        super().__init__(pipeline, spec, dtype, device)
        encoders = self._frozen(pipeline.text_encoder), self._frozen(pipeline.text_encoder_2)
        self.text_encoders = ((pipeline.tokenizer, encoders[0]), (pipeline.tokenizer_2, encoders[1]))
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self.zeros_for_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt", True))

    def embed(self, prompts: list[str]) -> Embedded:
        """Return hidden states [N, T, D] of both encoders, and the second one's pooled embedding [N, P]."""
        outputs = [
            encoder(self.token_ids(tokenizer, prompts).input_ids.to(self.device), output_hidden_states=True)
            for tokenizer, encoder in self.text_encoders
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Embedded(hidden.to(self.dtype), outputs[1].text_embeds.to(self.dtype))

    def embed_negative(self, prompts: list[str]) -> Embedded:
        """Like `embed`; an empty prompt is all zeros if the checkpoint was trained so, as in diffusers."""
        embedded = self.embed(prompts)
        if not self.zeros_for_empty:
            return embedded
        assert embedded.pooled_ND is not None
        present = torch.tensor([prompt != "" for prompt in prompts], device=self.device, dtype=self.dtype)
        return Embedded(embedded.hidden_NTD * present[:, None, None], embedded.pooled_ND * present[:, None])

    def view_conditions(self, conditioning: Conditioning, count: int, height: int, width: int) -> dict[str, Tensor]:
        """Return the pooled embedding, and the size in pixels: each view is conditioned as an uncropped image."""
        assert conditioning.pooled_ND is not None
        size = (height * self.spec.factor, width * self.spec.factor)
        sizes = torch.tensor([*size, 0, 0, *size], device=self.device, dtype=torch.float32)
        views = conditioning.paths * count
        return {"text_embeds": conditioning.pooled_ND.repeat_interleave(count, 0), "time_ids": sizes.repeat(views, 1)}
