"""What the two paths of classifier-free guidance have in common: the views, up to the first prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from madgen.diffusion.attention import JointAttention


class Once:
    """The layers of a UNet before its first prompt: while `on`, they compute half of a batch: the rest is the same.

    These are the first residual block and the self-attention behind it, a fortieth of Stable Diffusion's work with two
    paths. Where the paths are told apart before (SDXL's sizes and pooled prompts are part of the time's embedding),
    `possible` is False.
    """

    def __init__(self, unet: Any, processors: dict[str, JointAttention]):
        self.on = False
        config = unet.config
        told = config.get("class_embed_type") or config.get("addition_embed_type")
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        self.possible = not told and f"{name}.processor" in processors and not _asks_a_prompt(unet, name)
        if self.possible:
            block, self._attention = unet.down_blocks[0].resnets[0], processors[f"{name}.processor"]
            block.forward = partial(self._run, block.forward)

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """For the passes within; `on` where the second half of the views is the first again."""
        self._switch(on)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        self.on = on and self.possible
        if self.possible:
            self._attention.twice = self.on

    def _run(self, forward: Any, hidden: Tensor, time: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not self.on:
            return forward(hidden, time, *arguments, **options)
        half = len(hidden) // 2
        output = forward(hidden[:half], time[:half], *arguments, **options)
        return torch.cat([output, output])


def _asks_a_prompt(unet: nn.Module, name: str) -> bool:
    return bool(getattr(unet.get_submodule(name), "is_cross_attention", True))
