"""Stable Diffusion XL base: two text encoders, and a UNet conditioned on the image size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._sizes import CLIP_G, CLIP_L
from madgen.backbones._unet import UNetBackbone
from madgen.backbones._unet_family import CONVOLVING, unet_size, unet_specs
from madgen.hub.model_configs import read_index
from madgen.hub.model_size import Parameters
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionXL(UNetBackbone):
    """Stable Diffusion XL: the UNet attends to the concatenated penultimate hidden states of both text encoders."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    controlled_pipelines = ("StableDiffusionXLControlNetPipeline",)
    text_encoder_parts = ("text_encoder", "text_encoder_2")
    tokenizer_parts = ("tokenizer", "tokenizer_2")
    assumed_specs = unet_specs(view_size=128, coarsest=4)
    assumed_sizes = {"": unet_size(Parameters(2_567_463_684), (CLIP_L, CLIP_G), CONVOLVING * 320)}
    pools = True

    def __init__(self, pipeline: Any, *arguments: Any):
        super().__init__(pipeline, *arguments)
        self.zeros_for_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt", True))

    @classmethod
    def configs(cls, files: ModelFiles) -> tuple[dict[str, Any], ...]:
        """Read the config files; UserError for a refiner, or a UNet without size conditioning."""
        if read_index(files).get("requires_aesthetics_score"):
            raise UserError(
                f"backbone.pretrained={files.pretrained} is a refiner; backbone.name=sdxl loads the base model"
            )
        configs = super().configs(files)
        if configs[1].get("addition_embed_type") != "text_time":
            raise UserError(
                f"backbone.pretrained={files.pretrained}: the UNet's addition_embed_type is "
                f"{configs[1].get('addition_embed_type')}; backbone.name=sdxl supports text_time"
            )
        return configs

    @classmethod
    def loading_options(cls, files: ModelFiles) -> dict[str, Any]:
        """Leave out the watermark."""
        return {"add_watermarker": False}

    @classmethod
    def check_pipeline(cls, pipeline: Any) -> None:
        """Raise UserError for a refiner, or parts that are not supported."""
        super().check_pipeline(pipeline)
        if pipeline.config.get("requires_aesthetics_score"):
            raise UserError("pipe: a refiner is not supported; load the base model")

    def embed(self, prompts: list[str]) -> Embedded:
        """Return hidden states [N, T, D] of both encoders, and the second one's pooled embedding [N, P]."""
        outputs = [
            encoder(self.token_ids(tokenizer, prompts).input_ids.to(self.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
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


BACKBONE = StableDiffusionXL
