"""Describe a family of Stable Diffusion models with a UNet: attention layers, shapes, sizes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from madgen.backbones import BackboneSpec, Guidance, ModelSize, _vae, silence_model_libraries
from madgen.backbones._family import ALL, Family
from madgen.backbones._sizes import KL_PIXEL, KL_VAE
from madgen.hub import tokenizers
from madgen.hub.model_size import VAE, Parameters
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

ATTENDING, CONVOLVING = 26.0, 17.0
"""Activations of a latent cell at the peak of a level, with and without attention, in units of its channels;
measured."""
BLOCK_PATTERNS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}


def unet_specs(view_size: int, coarsest: int) -> dict[str, BackboneSpec]:
    """Return the shapes of published checkpoints, of which consistency models embed their guidance."""
    guidance: dict[str, Guidance] = {"lcm": "embedded", "": "cfg"}
    return {part: BackboneSpec(4, 8, view_size, coarsest, kind) for part, kind in guidance.items()}


def unet_size(network: Parameters, encoders: tuple[Parameters, ...], per_cell: float) -> ModelSize:
    """Return the size of a published model."""
    return ModelSize(network, KL_VAE, encoders, per_cell, KL_PIXEL, upcasts_vae=True)


def attention_of(unet: torch.nn.Module) -> dict[str, Any]:
    """Return the attention layers by the names of diffusers' processors."""
    return {f"{name}.processor": module for name, module in sorted(unet.named_modules()) if hasattr(module, "to_q")}


class UNetFamily(Family):
    """A family of Stable Diffusion models with a UNet."""

    part = "unet"
    tokenizer_parts: ClassVar[tuple[str, ...]] = ("tokenizer",)
    single_file_parts = {
        "vae": VAE,
        "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
        "text_encoder_2": ("conditioner.embedders.1.",),
    }

    @staticmethod
    def layer_groups(layers: Sequence[str]) -> dict[str, list[str]]:
        return {name: fnmatch.filter(layers, pattern) for name, pattern in BLOCK_PATTERNS.items()}

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        return BackboneSpec(
            channels=network["in_channels"],
            factor=_vae.factor_of(vae),
            view_size=network["sample_size"],
            coarsest=2 ** (len(network["block_out_channels"]) - 1),
            guidance="cfg" if network.get("time_cond_proj_dim") is None else "embedded",
        )

    @classmethod
    def activations(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
        """Return the activations per latent cell of a view: of the level of the UNet that has the most."""
        levels = zip(network["block_out_channels"], network["down_block_types"], strict=True)
        alive = (
            (ATTENDING if "CrossAttn" in block else CONVOLVING) * channels / 4**level
            for level, (channels, block) in enumerate(levels)
        )
        return {"per_cell": max(alive), "upcasts_vae": vae.get("force_upcast", True)}

    @classmethod
    def check_blocks(cls, blocks: Sequence[str], files: ModelFiles) -> None:
        _, unet, _ = cls.configs(files)
        attend = {
            "down": any("CrossAttn" in name for name in unet.get("down_block_types", ())),
            "mid": "CrossAttn" in str(unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")),
            "up": any("CrossAttn" in name for name in unet.get("up_block_types", ())),
        }
        if all(block == ALL or attend.get(block) for block in blocks):
            return  # without importing diffusers
        from diffusers import UNet2DConditionModel

        silence_model_libraries()
        with torch.device("meta"):
            cls.selected(list(attention_of(UNet2DConditionModel.from_config(unet))), blocks)

    @classmethod
    def text_limit(cls, files: ModelFiles, max_sequence_length: int | None = None) -> TextLimit | None:
        cls.arguments(max_sequence_length, "none")
        return tokenizers.text_limit(cls.tokenizer_parts, files)

    @classmethod
    def arguments(cls, max_sequence_length: int | None, offload: str) -> dict[str, Any]:
        """Return no arguments. Raises UserError for settings of transformers."""
        if max_sequence_length is not None:
            raise UserError(
                f"backbone.max_sequence_length={max_sequence_length} has no effect: this backbone's text encoders have "
                "a fixed length; set it to null"
            )
        if offload != "none":
            raise UserError(f"backbone.offload={offload} is not supported for UNets; set it to none")
        return {}
