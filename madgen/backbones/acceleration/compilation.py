"""`torch.compile` with static shapes: the same graph, and the same bytes, for the same shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from madgen.utils.errors import UserError

MAX_GRAPHS = 4096
"""Recompilation limit. By default the ninth shape would silently run uncompiled."""


def check_compiler(backend: str, device: torch.device) -> None:
    """Raise UserError if PyTorch cannot compile for `device`; compiles a small kernel, which takes a few seconds."""
    if backend != "inductor":
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns about missing GPUs
    try:
        compiled(lambda tensor: tensor + 1, backend)(torch.ones(8, device=device))
    except Exception as error:  # from Dynamo, Inductor, Triton, the compiler or the cache directory
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip().partition("\n")[0]
        raise UserError(
            f"backbone.compile: PyTorch cannot compile on this machine: {type(cause).__name__}: {reason}; install a "
            "C++ compiler (g++), set a writable TORCHINDUCTOR_CACHE_DIR, or set backbone.compile=false"
        ) from error


def compiled(model: Callable[..., Any], backend: str) -> Any:
    """Compile a module or a function to whole graphs, each when its shapes first occur (a minute for a large UNet).

    Kernels are not autotuned if that would change the order of additions: another run must choose the same ones.
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, MAX_GRAPHS)
    deterministic = backend == "inductor" and hasattr(inductor, "deterministic")
    options: Any = {"deterministic": True} if deterministic else None
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend, options=options)


@contextmanager
def replaced_forward(model: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Replace `model.forward` within this context; None: leave it."""
    if forward is None:
        yield
        return
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
