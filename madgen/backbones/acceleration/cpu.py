"""Faster layers on CPUs; results differ in the last bits only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from madgen.diffusion.kernels import onednn

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1024
"""Rows per chunk of a feed-forward layer; a row has 2 kB in the demo backbone, 10 to 40 kB in Stable Diffusion."""


def prepare(model: torch.nn.Module) -> None:
    """Run linear layers by oneDNN where that is faster, and feed-forward layers in chunks."""
    keep_in_cache(model)
    for module in model.modules():
        if type(module) is torch.nn.Linear and onednn.is_faster() and _is_plain(module):
            module.forward = partial(linear, module)  # type: ignore[method-assign]


def _is_plain(layer: torch.nn.Linear) -> bool:
    """Return whether a layer is neither quantised nor has hooks around its forward pass."""
    return type(layer.weight) is torch.nn.Parameter and "forward" not in vars(layer)


def linear(layer: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """Apply a linear layer, by oneDNN if possible."""
    if onednn.takes(hidden, layer.weight):
        return onednn.linear(hidden, layer.weight, layer.bias)
    return torch.nn.functional.linear(hidden, layer.weight, layer.bias)


def keep_in_cache(model: torch.nn.Module) -> None:
    """Run diffusers' feed-forward layers on `ROWS` rows at a time, so that intermediate results stay in the CPU caches.

    Otherwise processes on one machine compete for memory bandwidth: the demo was 1.2 times slower beside another
    process. Chunks are of even size because a small remainder may use another code path with other last bits.
    """
    from diffusers.models.attention import FeedForward

    for module in model.modules():
        if isinstance(module, FeedForward):
            module.forward = partial(by_rows, module.forward)


def by_rows(forward: Callable[..., Tensor], hidden_NKD: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Apply a row-wise function to [..., D] in chunks of rows."""
    rows = hidden_NKD.reshape(-1, hidden_NKD.shape[-1])
    if len(rows) <= ROWS:
        return forward(hidden_NKD, *arguments, **options)
    parts = [forward(part, *arguments, **options) for part in rows.tensor_split(-(-len(rows) // ROWS))]
    return torch.cat(parts).reshape(*hidden_NKD.shape[:-1], -1)
