"""Libraries that others import at the top of their modules, although most commands use nothing of them.

Importing them would take a sixth of the CPU time until the first denoising step. They are loaded as soon as they are
used, for example PyTorch's compiler by `backbone.compile`.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from madgen.utils.deferred_import import StandIns, defer_import, is_loaded, load, when_loaded

COMPILER = "torch._dynamo"


def defer_libraries() -> None:
    """Defer PyTorch, its compiler, torchmetrics, and what diffusers' schedulers and accelerate import besides."""
    defer_import("torch")
    defer_import(COMPILER, _compiler(), independent={f"{COMPILER}._trace_wrapped_higher_order_op"})
    defer_import(f"{COMPILER}.utils", {"is_compile_supported": lambda: _is_compile_supported})
    defer_import("torchmetrics", _torchmetrics(), independent={"torchmetrics"})
    defer_import("wandb.sdk.launch", independent={"wandb.sdk.launch"})
    for module in ("scipy.integrate", "scipy.stats", "boto3", "trio"):
        defer_import(module)
    metadata.packages_distributions = functools.cache(metadata.packages_distributions)  # several libraries ask for it


def _compiler() -> StandIns:
    """Return what diffusers, transformers and Lightning import to tell the compiler about their functions."""
    return {
        "allow_in_graph": lambda: functools.partial(_mark_when_loaded, "allow_in_graph"),
        "assume_constant_result": lambda: functools.partial(_mark_when_loaded, "assume_constant_result"),
        "disable": lambda: _disable,
        "OptimizedModule": _OptimizedModule,
        "eval_frame": lambda: SimpleNamespace(OptimizedModule=_OptimizedModule()),
    }


def _mark_when_loaded(mark: str, function: Any) -> Any:
    """Return a function or class unchanged; the compiler marks it when it loads."""
    when_loaded(COMPILER, lambda module: getattr(module, mark)(function))
    return function


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """Return a function that is not to be compiled: as long as the compiler is not loaded, nothing is."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, **options)

    @functools.wraps(function)
    def disabled(*args: Any, **kwargs: Any) -> Any:
        if not is_loaded(COMPILER):
            return function(*args, **kwargs)
        return load(COMPILER).disable(function, recursive, **options)(*args, **kwargs)

    return disabled


class _OptimizedModule:
    """Stand in for the class of compiled modules in `isinstance`: without the compiler there are none."""

    def __instancecheck__(self, instance: Any) -> bool:
        return is_loaded(COMPILER) and isinstance(instance, load(COMPILER).OptimizedModule)


def _is_compile_supported(device: str) -> Any:
    return load(f"{COMPILER}.utils").is_compile_supported(device)


def _torchmetrics() -> StandIns:
    """Return what Lightning imports of torchmetrics."""
    return {
        "__version__": lambda: metadata.version("torchmetrics"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
        "Metric": _metric("torchmetrics.metric", "Metric"),
        "MetricCollection": _metric("torchmetrics.collections", "MetricCollection"),
    }


def _metric(module: str, name: str) -> Callable[[], Any]:
    def metric() -> Any:
        importlib.import_module("torchmetrics.utilities")  # first, else the modules import each other in a circle
        return getattr(importlib.import_module(module), name)

    return metric
