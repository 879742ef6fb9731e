"""`torch.compile` with the same graph, and the same bytes, for the same shapes."""

from __future__ import annotations

from typing import Any

import torch

MOST_GRAPHS = 4096
"""A graph more would be an error; by default the ninth shape would silently run uncompiled."""


def compiled(model: torch.nn.Module, backend: str) -> Any:
    """`model` in whole graphs; each is made when its shapes are first met, which takes a minute for a large UNet.

    Kernels are not chosen by timing them where that would change the order of additions: another run of the same job
    must find the same ones.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, MOST_GRAPHS)
    options: Any = {"deterministic": True} if backend == "inductor" and _has("deterministic") else None
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend, options=options)


def _has(option: str) -> bool:
    import torch._inductor.config as inductor

    return hasattr(inductor, option)
