"""`torch.compile` with the same graph, and the same bytes, for the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOST_GRAPHS = 4096
"""A graph more would be an error; by default the ninth shape would silently run uncompiled."""


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


def compile_forward(model: torch.nn.Module, backend: str, when: Callable[[], bool]) -> None:
    """From now on `model` runs in compiled graphs in calls at whose time `when()` holds, else as it is."""
    plain: Any = model.forward
    graphs = compiled(plain, backend)

    def forward(*arguments: Any, **options: Any) -> Any:
        return (graphs if when() else plain)(*arguments, **options)

    model.forward = forward


def _has(option: str) -> bool:
    import torch._inductor.config as inductor

    return hasattr(inductor, option)
