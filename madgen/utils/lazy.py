"""Modules that are imported on first use, so that commands that load no weights start without torch."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class LazyModule(ModuleType):
    """Stand in for a module until an attribute of any such object is used.

    Then all of them are imported, and replaced in the modules of madgen.
    """

    pending: list[LazyModule] = []

    def __init__(self, name: str):
        super().__init__(name)
        self.pending.append(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of `inspect`, `copy` and the like, which look at every object
            raise AttributeError(name)
        return getattr(self._imported(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._imported(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._imported(), name)

    def _imported(self) -> ModuleType:
        modules = {lazy: importlib.import_module(lazy.__name__) for lazy in self.pending}
        for each in [module for key, module in sys.modules.items() if key.startswith("madgen")]:
            for key, value in list(vars(each).items()):
                if isinstance(value, LazyModule):
                    setattr(each, key, modules[value])
        return modules[self]


if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as functional
else:
    torch = LazyModule("torch")
    functional = LazyModule("torch.nn.functional")


def no_grad(function: Function) -> Function:
    """Decorate a function like `torch.no_grad()`, without importing torch."""
    return _within(lambda: torch.no_grad(), function)


def no_inference_mode(function: Function) -> Function:
    """Decorate a function like `torch.inference_mode(False)`, without importing torch."""
    return _within(lambda: torch.inference_mode(False), function)


def _within(context: Callable[[], Any], function: Any) -> Any:
    @functools.wraps(function)
    def decorated(*arguments: Any, **options: Any) -> Any:
        with context():
            return function(*arguments, **options)

    return decorated
