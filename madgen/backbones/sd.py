"""Stable Diffusion 1.x and 2.x, and Latent Consistency Models distilled from them."""

from __future__ import annotations

from typing import Any

from madgen.backbones._conditioning import Embedded
from madgen.backbones._sizes import CLIP_H
from madgen.backbones._unet import UNetBackbone
from madgen.backbones._unet_family import ATTENDING, unet_size, unet_specs
from madgen.hub.model_size import Parameters
from madgen.hub.weights import ModelFiles


class StableDiffusion(UNetBackbone):
    """Stable Diffusion 1.x and 2.x: the UNet attends to the last hidden states of one text encoder."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    controlled_pipelines = ("StableDiffusionControlNetPipeline",)
    assumed_specs = unet_specs(view_size=64, coarsest=8)
    assumed_sizes = {"": unet_size(Parameters(865_910_724), (CLIP_H,), ATTENDING * 320)}  # of Stable Diffusion 2

    @classmethod
    def loading_options(cls, files: ModelFiles) -> dict[str, Any]:
        """Leave out the safety checker, which is made for single images."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def embed(self, prompts: list[str]) -> Embedded:
        """Return the text encoder's last hidden states [N, T, D]."""
        (encoder,) = self.text_encoders
        tokens = self.token_ids(self.tokenizers[0], prompts)
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        return Embedded(encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].to(self.dtype))


BACKBONE = StableDiffusion
