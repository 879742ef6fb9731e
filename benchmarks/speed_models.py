"""Models of the speed benchmark: true shapes from the public config values, with random weights made on the device."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from madgen.backbones._unet import unet_spec
from madgen.backbones.sd import StableDiffusion
from madgen.backbones.sdxl import StableDiffusionXL
from madgen.demo.scenes import vocabulary
from madgen.demo.tokenizer import build_tokenizer

TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """Config values of a model's parts."""

    name: str
    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    vae_groups: int = 32
    scaling: float = 0.18215
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_xl(self) -> bool:
        """Two text encoders, and a UNet that is told sizes."""
        return len(self.texts) == 2


def _text(width: int, layers: int, heads: int, projection: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": projection}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}


def _unet(widths: tuple[int, ...], heads: tuple[int, ...], text: int, size: int, crosses: tuple[bool, ...]) -> dict:
    return {
        "sample_size": size,
        "block_out_channels": widths,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "cross_attention_dim": text,
        "use_linear_projection": True,
        "down_block_types": tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crosses),
        "up_block_types": tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crosses)),
    }


_XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "sd2",
            _unet((320, 640, 1280, 1280), (5, 10, 20, 20), 1024, 64, (True, True, True, False)),
            (_text(1024, 23, 16, 512),),
        ),
        Shape(
            "sdxl",
            {
                **_unet((320, 640, 1280), (5, 10, 20), 2048, 128, (False, True, True)),
                **_XL,
                "transformer_layers_per_block": (1, 2, 10),
                "projection_class_embeddings_input_dim": 2816,
            },
            (_text(768, 12, 12, 768), _text(1280, 32, 20, 1280)),
            scaling=0.13025,
        ),
        Shape(
            "tiny",
            {**_unet((16, 32), (2, 2), 32, 64, (True, True)), "layers_per_block": 1, "norm_num_groups": 8},
            (_text(32, 2, 2, 32),),
            vae_widths=(8, 8, 8, 8),
            vae_groups=8,
        ),
        Shape(
            "tiny-xl",
            {
                **_unet((16, 32), (2, 2), 64, 64, (False, True)),
                **_XL,
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "transformer_layers_per_block": (1, 2),
                "projection_class_embeddings_input_dim": 32 + 6 * 256,
            },
            (_text(32, 2, 2, 32), _text(32, 2, 2, 32)),
            vae_widths=(8, 8, 8, 8),
            vae_groups=8,
            scaling=0.13025,
        ),
    )
}


def build_pipeline(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A diffusers pipeline of random weights, made where they are needed."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    levels = len(shape.vae_widths)
    tokenizers = [_tokenizer() for _ in shape.texts]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(**shape.unet)
            vae = AutoencoderKL(
                block_out_channels=shape.vae_widths,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=2 if shape.vae_groups == 32 else 1,
                norm_num_groups=shape.vae_groups,
                scaling_factor=shape.scaling,
                sample_size=512,
            )
            configs = [
                CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, eos_token_id=1, **text)
                for text in shape.texts
            ]
            kinds = (CLIPTextModel, CLIPTextModelWithProjection)
            encoders = [kind(config) for kind, config in zip(kinds, configs, strict=False)]
    finally:
        torch.set_default_dtype(before)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler}
    if shape.is_xl:
        named = {f"tokenizer{end}": tokenizer for end, tokenizer in zip(("", "_2"), tokenizers, strict=True)}
        named |= {f"text_encoder{end}": encoder for end, encoder in zip(("", "_2"), encoders, strict=True)}
        return StableDiffusionXLPipeline(**parts, **named, add_watermarker=False)
    return StableDiffusionPipeline(
        **parts, tokenizer=tokenizers[0], text_encoder=encoders[0],
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(vocabulary(), Path(folder))
    tokenizer.model_max_length = TOKENS
    return tokenizer


def build_backbone(pipeline: Any, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """madgen's view of the same weights."""
    spec = unet_spec(pipeline.unet.config, pipeline.vae.config)
    return (StableDiffusionXL if shape.is_xl else StableDiffusion)(pipeline, spec, dtype, device)
