"""Models in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_float32(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Weights of less precision become float32, and within it what is computed with them; then what they were, exactly.

    Every number of bfloat16 and float16 is one of float32, so the way there and back changes none.
    """
    changed = [
        (tensor, tensor.dtype)
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    try:
        for tensor, _ in changed:
            _convert(tensor, torch.float32)
        yield
    finally:
        for tensor, dtype in changed:
            _convert(tensor, dtype)


@torch.inference_mode(False)  # a trainer may have switched it on; weights made under it would bear no gradients
def _convert(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)
