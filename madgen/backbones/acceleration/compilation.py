"""`torch.compile` with the same graph, and the same bytes, for the same shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from madgen.utils.errors import UserError

MOST_GRAPHS = 4096
"""A graph more would be an error; by default the ninth shape would silently run uncompiled."""


def check_compiler(backend: str, device: torch.device) -> None:
    """UserError if PyTorch cannot make kernels for `device` here, told by making one; it takes some seconds."""
    if backend != "inductor":
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # who has no GPU knows
    try:
        compiled(lambda tensor: tensor + 1, backend)(torch.ones(8, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton, a compiler, the cache's folder
        cause = getattr(error, "inner_exception", error)
        why = str(cause).strip().partition("\n")[0]
        raise UserError(
            f"backbone.compile: PyTorch cannot compile here: {type(cause).__name__}: {why}; it needs a C++ compiler "
            "(g++) and a folder for its cache (TORCHINDUCTOR_CACHE_DIR); or set it to false"
        ) from error


def compiled(model: Callable[..., Any], backend: str) -> Any:
    """`model`, a module or a function, in whole graphs.

    Each is made when its shapes are first met, which takes a minute for a large UNet. Kernels are not chosen by timing
    them where that would change the order of additions: another run of the same job must find the same ones.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, MOST_GRAPHS)
    options: Any = {"deterministic": True} if backend == "inductor" and _has("deterministic") else None
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend, options=options)


@contextmanager
def instead(model: torch.nn.Module, graphs: Any) -> Iterator[None]:
    """Within it a call of `model` runs `graphs`; None: the model as it is."""
    if graphs is None:
        yield
        return
    model.forward = graphs
    try:
        yield
    finally:
        del model.forward


def _has(option: str) -> bool:
    import torch._inductor.config as inductor

    return hasattr(inductor, option)
