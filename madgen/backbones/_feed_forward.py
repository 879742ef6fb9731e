"""Feed-forward layers on a CPU: so many rows at a time that what lies between their two products stays in its caches.

Without this, processes on the cores of one machine wait for each other's memory: sampling the demo's panoramas took
1.2 times as long beside another process. Parts are even, for few rows by themselves may take another path with other
last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

ROWS = 1024
"""Of 2 kB in the demo backbone, of 10 to 40 kB in Stable Diffusion."""


def keep_in_cache(model: torch.nn.Module) -> None:
    """From now on diffusers' feed-forward layers of `model` work on `ROWS` rows at a time."""
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
