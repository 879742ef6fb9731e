"""Import a library on first use, as Python 3.15's `lazy import` does.

`importlib.util.LazyLoader` is similar, but any `import` statement of the same module would load it.
"""

from __future__ import annotations

import importlib.util
import sys
from threading import RLock
from types import ModuleType
from typing import Any

_lock = RLock()


class _DeferredModule(ModuleType):
    """A module in `sys.modules` that loads when an attribute is first read."""

    def __getattr__(self, name: str) -> Any:
        with _lock:
            spec = self.__spec__
            assert spec is not None
            if spec.loader_state is None:
                assert spec.loader is not None
                spec.loader_state = "loading"  # the module may import itself
                self.__path__ = spec.submodule_search_locations or []
                spec.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
        return ModuleType.__getattribute__(self, name)


def defer_import(package: str) -> None:
    """Make later `import package` statements load it when its first attribute is read.

    Does nothing for packages that are loaded already or not installed.
    """
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        del module.__path__  # so that imports of submodules load it
        module.__class__ = _DeferredModule
        sys.modules[package] = module
