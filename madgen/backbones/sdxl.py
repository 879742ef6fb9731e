"""Stable Diffusion XL base: two text encoders, and a UNet that is told the size of the picture."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from madgen.backbones import BackboneSpec
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._loading import Checkpoint, load_backbone
from madgen.backbones._schedulers import evaluated_steps, own_scheduler, scheduler_class
from madgen.backbones._unet import UNetBackbone, check_blocks, unet_spec
from madgen.hub import tokenizers as _tokens
from madgen.hub.model_configs import check_class, read_configs
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import check_hub_id, single_file
from madgen.utils.errors import UserError

__all__ = [
    "StableDiffusionXL",
    "check_blocks",
    "describe",
    "evaluated_steps",
    "family_spec",
    "load",
    "own_scheduler",
    "scheduler_class",
    "text_limit",
]

PIPELINES = ("StableDiffusionXLPipeline",)


def describe(pretrained: str, revision: str | None = None, config: str | None = None) -> BackboneSpec:
    """Reads the config files of a folder, a hub id or a single file; UserError if there is no such model."""
    model, unet, vae = read_configs(pretrained, revision, config)
    if model.get("requires_aesthetics_score"):
        raise UserError(f"backbone.pretrained={pretrained} is a refiner of pictures; backbone.name=sdxl loads the base")
    check_class(model, pretrained, "sdxl", PIPELINES)
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(
            f"backbone.pretrained={pretrained}: the UNet's addition_embed_type is {unet.get('addition_embed_type')}; "
            "backbone.name=sdxl knows text_time"
        )
    return unet_spec(unet, vae)


def family_spec(pretrained: str) -> BackboneSpec:
    """For planning without config files: the shapes that all Stable Diffusion XL base models share.

    Raises UserError for what can be neither a hub id nor a single file.
    """
    if single_file(pretrained) is None:
        check_hub_id(pretrained)
    return BackboneSpec(channels=4, factor=8, view_size=128, coarsest=4, guidance_embedded="lcm" in pretrained.lower())


def text_limit(pretrained: str, revision: str | None = None, config: str | None = None) -> TextLimit | None:
    """How many tokens of a prompt are seen; None if the tokenizer's files are not at hand."""
    return _tokens.text_limit(("tokenizer", "tokenizer_2"), pretrained, revision, config)


def load(pretrained: str, **checkpoint: Unpack[Checkpoint]) -> StableDiffusionXL:
    """Loads a diffusers folder, a hub id or a single file; safetensors only, nothing is unpickled."""
    options = {"add_watermarker": False}
    return load_backbone(StableDiffusionXL, describe, pretrained, checkpoint, **options)


class StableDiffusionXL(UNetBackbone):
    """The UNet attends to the penultimate hidden states of both text encoders, side by side."""

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        super().__init__(pipeline, spec, dtype, device)
        encoders = self._frozen(pipeline.text_encoder), self._frozen(pipeline.text_encoder_2)
        self.text_encoders = ((pipeline.tokenizer, encoders[0]), (pipeline.tokenizer_2, encoders[1]))
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self.zeros_for_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt", True))

    def embed(self, prompts: list[str]) -> Embedded:
        """Hidden states [N, T, D], D the sum of both widths; the second encoder gives their summary [N, P]."""
        outputs = [
            encoder(self.token_ids(tokenizer, prompts).input_ids.to(self.device), output_hidden_states=True)
            for tokenizer, encoder in self.text_encoders
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Embedded(hidden.to(self.dtype), outputs[1].text_embeds.to(self.dtype))

    def embed_negative(self, prompts: list[str]) -> Embedded:
        """As `embed`; the empty prompt is zeros where the checkpoint was trained so (diffusers: no negative prompt)."""
        embedded = self.embed(prompts)
        if not self.zeros_for_empty:
            return embedded
        assert embedded.pooled_ND is not None
        present = torch.tensor([prompt != "" for prompt in prompts], device=self.device, dtype=self.dtype)
        return Embedded(embedded.hidden_NTD * present[:, None, None], embedded.pooled_ND * present[:, None])

    def view_conditions(self, conditioning: Conditioning, count: int, height: int, width: int) -> dict[str, Tensor]:
        """The prompt's summary, and the size in pixels: each view is told that it is a whole picture, not cropped."""
        assert conditioning.pooled_ND is not None
        size = (height * self.spec.factor, width * self.spec.factor)
        sizes = torch.tensor([*size, 0, 0, *size], device=self.device, dtype=torch.float32)
        views = conditioning.paths * count
        return {"text_embeds": conditioning.pooled_ND.repeat_interleave(count, 0), "time_ids": sizes.repeat(views, 1)}
