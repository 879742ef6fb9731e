"""Count the operations of transformers at their true shapes: `python benchmarks/operations.py`.

Runs each network on PyTorch's meta device, which has shapes but no numbers, and prints a Markdown table: floating-point
operations of one step of a panorama without a second pass for guidance, for overlapping views that do not merge, and
for the canvas as one view, which is direct inference and also MAD in all layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from madgen.backbones import backbone_module
from madgen.backbones._conditioning import Conditioning
from madgen.diffusion.views import build_layout


@dataclass(frozen=True)
class Model:
    """A published model: its family, its network and the embeddings of a prompt."""

    name: str
    family: str
    build: Callable[[], Any]
    channels: int
    text: tuple[int, int]
    """Tokens of the prompt and their width."""
    pooled: int = 0
    """Width of the pooled embedding; 0 if there is none."""


def models() -> list[Model]:
    from diffusers import (
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        QwenImageTransformer2DModel,
        SD3Transformer2DModel,
        ZImageTransformer2DModel,
    )

    medium = {
        "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
        "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    }  # fmt: skip
    klein = {
        "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
        "joint_attention_dim": 7680, "guidance_embeds": False,
    }  # fmt: skip
    return [
        Model("FLUX.1 [dev]", "flux", partial(FluxTransformer2DModel, guidance_embeds=True), 16, (512, 4096), 768),
        Model("Stable Diffusion 3.5 medium", "sd3", partial(SD3Transformer2DModel, **medium), 16, (333, 4096), 2048),
        Model("FLUX.2 [klein] 4B", "flux2", partial(Flux2Transformer2DModel, **klein), 32, (512, 7680)),
        Model("Z-Image", "z_image", ZImageTransformer2DModel, 16, (512, 2560)),
        Model("Qwen-Image", "qwen_image", QwenImageTransformer2DModel, 16, (512, 3584)),
    ]


def operations(model: Model, network: Any, height: int, width: int, views: int) -> int:
    """Return the operations of a pass over `views` views of `height` x `width` latent cells."""
    meta = torch.device("meta")
    family: Any = backbone_module(model.family)
    shell = SimpleNamespace(device=meta)
    if hasattr(family, "_text_ids"):
        shell._text_ids = partial(family._text_ids, shell)
    pooled = torch.empty(1, model.pooled, device=meta) if model.pooled else None
    guidance = torch.ones(1, device=meta) if "[dev]" in model.name else None
    prompt = Conditioning(torch.empty(1, *model.text, device=meta), 1.0, guidance, pooled)
    cells = torch.empty(views, model.channels, height, width, device=meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        family.run(shell, network, cells, torch.full((views,), 500.0, device=meta), prompt)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--width", type=int, default=4096, help="pixels (default: 4096)")
    parser.add_argument("--stride", type=int, default=32, help="latent cells of 8 px (default: 32)")
    options = parser.parse_args()
    rows, columns, size = options.height // 8, options.width // 8, 128
    count = build_layout("overlapping", rows, columns, size, options.stride, False).at(0).count
    print(f"| model | {count} views, not merged | canvas: direct, or MAD in all layers | ratio |\n|---|---|---|---|")
    for model in models():
        with torch.device("meta"):
            network = model.build()
        published = backbone_module(model.family).assumed_sizes[""].network.total
        found = sum(parameter.numel() for parameter in network.parameters())
        assert found == published, f"{model.name} has {found} parameters, not {published}"
        views = operations(model, network, size, size, count)
        canvas = operations(model, network, rows, columns, 1)
        print(
            f"| {model.name} | {views / 1e12:.0f} TFLOP | {canvas / 1e12:.0f} TFLOP | {views / canvas:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
