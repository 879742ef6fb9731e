"""What a network does otherwise on a CPU: the same numbers but for the last bits, sooner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madgen.diffusion.kernels import onednn

ROWS = 1024
"""Of 2 kB in the demo backbone, of 10 to 40 kB in Stable Diffusion."""


def prepare(model: nn.Module) -> None:
    """Linear layers by oneDNN where that is faster, feed-forward layers in parts."""
    keep_in_cache(model)
    for module in model.modules():
        if type(module) is nn.Linear and onednn.is_faster():
            module.forward = partial(linear, module)  # type: ignore[method-assign]


def linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """What `layer` does of itself."""
    if onednn.takes(hidden, layer.weight):
        return onednn.linear(hidden, layer.weight, layer.bias)
    return F.linear(hidden, layer.weight, layer.bias)


def keep_in_cache(model: nn.Module) -> None:
    """From now on diffusers' feed-forward layers of `model` work on `ROWS` rows at a time, so that what lies between
    their two products stays in the processor's caches.

    Without this, processes on the cores of one machine wait for each other's memory: sampling the demo's panoramas
    took 1.2 times as long beside another process. Parts are even, for few rows by themselves may take another path
    with other last bits.
    """
    from diffusers.models.attention import FeedForward

    for module in model.modules():
        if isinstance(module, FeedForward):
            module.forward = partial(by_rows, module.forward)


def by_rows(forward: Callable[..., Tensor], hidden_NKD: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """`forward(hidden)`, of a function that treats all rows alike [..., D]."""
    rows = hidden_NKD.reshape(-1, hidden_NKD.shape[-1])
    if len(rows) <= ROWS:
        return forward(hidden_NKD, *arguments, **options)
    parts = [forward(part, *arguments, **options) for part in rows.tensor_split(-(-len(rows) // ROWS))]
    return torch.cat(parts).reshape(*hidden_NKD.shape[:-1], -1)
