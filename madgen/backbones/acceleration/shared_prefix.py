"""Compute once what both paths of classifier-free guidance share: the layers before the first prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"


class SharedPrefix:
    """The first residual block of a UNet and the self-attention after it, on half of a batch whose halves are equal.

    They are a fortieth of Stable Diffusion's work with two paths. Where the paths differ earlier (SDXL's sizes and
    pooled prompts are part of the time embedding), `layer` is None.
    """

    def __init__(self, unet: Any, attention: Mapping[str, Any]):
        self.layer: str | None = None
        """The self-attention layer: `JointPass.halved` of passes whose halves are equal."""
        self._halved = False
        conditioned = unet.config.get("class_embed_type") or unet.config.get("addition_embed_type")
        first = attention.get(LAYER)
        if not conditioned and first is not None and not getattr(first, "is_cross_attention", True):
            self.layer = LAYER
            block = unet.down_blocks[0].resnets[0]
            block.forward = partial(self._run, block.forward)

    @contextmanager
    def halved(self, enabled: bool) -> Iterator[None]:
        """Within this context, run the residual block on the first half of its batch and repeat the result."""
        self._halved = enabled
        try:
            yield
        finally:
            self._halved = False

    def _run(self, forward: Any, hidden: Tensor, time: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not self._halved:
            return forward(hidden, time, *arguments, **options)
        half = len(hidden) // 2
        output = forward(hidden[:half], time[:half], *arguments, **options)
        return torch.cat([output, output])
