"""Shapes, sizes and models of the speed benchmark: public model configurations with random weights."""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from speed_contenders import Run, Timing, alternate, madgen_run, plain_attention, reference_folder, sampler_of

from madgen import PanoramaSampler
from madgen.backbones.sd import StableDiffusion
from madgen.backbones.sdxl import StableDiffusionXL

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from demo_backbone.scenes import vocabulary
from demo_backbone.tokenizer import build_tokenizer

TOKENS = 77
PAPER_STEPS, TAU = 50, 15
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Configuration of a model's parts."""

    name: str
    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    vae_groups: int = 32
    scaling: float = 0.18215
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_xl(self) -> bool:
        """True for two text encoders and size conditioning."""
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
    """Return a diffusers pipeline with random weights, created on the device."""
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
    """Return madgen's backbone with the weights of a pipeline."""
    backbone = StableDiffusionXL if shape.is_xl else StableDiffusion
    spec = backbone.spec_of(pipeline.config, pipeline.unet.config, pipeline.vae.config)
    return backbone(pipeline, spec, dtype, device)


@dataclass
class Bench:
    """Shapes and sizes of a run, and its models, which are built on first use."""

    device: torch.device
    shape: str
    xl_shape: str
    height: int
    width: int
    widths: tuple[int, ...]
    xl_size: tuple[int, int]
    rounds: int
    steps: int
    dtype: torch.dtype
    foreign_dtype: torch.dtype
    """Precision of the released code: float16 under autocast on a GPU; it does not support bfloat16."""
    backend: str = "inductor"
    panoramas: int = 4
    share: float = 1.0
    """Fraction of the fast preset's steps to run."""
    known: dict[str, Row] = field(default_factory=dict)

    @cached_property
    def pipeline(self) -> Any:
        """madgen's pipeline."""
        return build_pipeline(SHAPES[self.shape], self.dtype, self.device)

    @cached_property
    def backbone(self) -> Any:
        """madgen's backbone with the weights of `pipeline`."""
        if self.shape == "demo":
            return PanoramaSampler.from_pretrained("demo", dtype="float32", device=self.device).backbone
        return build_backbone(self.pipeline, SHAPES[self.shape], self.dtype, self.device)

    def copied(self, dtype: torch.dtype) -> Any:
        """Return a copy of the pipeline without madgen's changes: contiguous weights and diffusers' own methods."""
        ours = self.pipeline
        parts = dict(ours.components)
        for name in ("unet", "vae", "text_encoder"):
            parts[name] = copy.deepcopy(parts[name]).to(dtype=dtype, memory_format=torch.contiguous_format).eval()
            parts[name].requires_grad_(False)
            for module in parts[name].modules():
                vars(module).pop("forward", None)
        plain_attention(parts["unet"])
        parts["scheduler"] = copy.deepcopy(ours.scheduler)
        return type(ours)(**parts, requires_safety_checker=False)

    @cached_property
    def foreign(self) -> Any:
        """The pipeline of the released code."""
        return self.copied(self.foreign_dtype)

    @cached_property
    def foreign_same(self) -> Any:
        """The pipeline of diffusers, in the same precision as madgen."""
        return self.foreign if self.foreign_dtype == self.dtype else self.copied(self.dtype)

    def forget(self, *names: str) -> None:
        """Free models."""
        for name in names:
            self.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def released(self) -> bool:
        """True if the released code is available and can run this shape; its views have 64 cells."""
        return reference_folder() is not None and self.shape != "demo"

    def views(self, stride: int | None = None, width: int | None = None) -> int:
        """Return the number of views of a panorama."""
        return sampler_of(self.backbone, 0, stride).geometry.build(self.height, width or self.width).at(0).count

    def madgen(self, merged: float, compiled: bool = False, **method: Any) -> Run:
        """Return madgen at this size as a contender."""
        width = method.pop("width", self.width)
        return madgen_run(self.backbone, self.height, width, merged, compiled, **method)

    def measure(self, contenders: dict[str, Run], steps: int | None = None, rounds: int | None = None) -> Row:
        """Time contenders in alternation."""
        return as_row(alternate(contenders, steps or self.steps, rounds or self.rounds))


def as_row(timings: dict[str, Timing]) -> Row:
    """Convert timings to a row of the log."""
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return {
        "seconds_a_step": seconds,
        "median": {name: timing.median for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak for name, timing in timings.items() if timing.peak},
    }
