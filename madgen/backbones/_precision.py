"""Run models in float32 temporarily."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_float32(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Convert weights of lower precision to float32 within this context, and restore them exactly.

    float32 represents every bfloat16 and float16 number, so the round trip changes none.
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


def _convert(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode(False):
        tensor.data = tensor.data.to(dtype)
