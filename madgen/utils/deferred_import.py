"""Import a library on first use, as Python 3.15's `lazy import` does.

`importlib.util.LazyLoader` is similar, but any `import` statement of the same module would load it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType
from typing import Any, cast

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
                spec.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
        return ModuleType.__getattribute__(self, name)


class _LoadedModule(Loader):
    """Return a module that is loaded already, without executing it a second time."""

    def __init__(self, module: ModuleType, loader: Any):
        self.module, self.loader = module, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader


class _SubmoduleFinder(MetaPathFinder):
    """Find submodules of a deferred package: load the package first, which may load the submodule as well."""

    def __init__(self, package: _DeferredModule):
        self.package = package

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{self.package.__name__}."):
            return None
        sys.meta_path.remove(self)
        self.package.__getattr__("__name__")  # loads it
        module = sys.modules.get(name)
        if module is None or module.__spec__ is None:
            return None
        module.__spec__.loader = _LoadedModule(module, module.__spec__.loader)
        return module.__spec__


def defer_import(package: str) -> None:
    """Make later `import package` statements load it when its first attribute is read.

    Does nothing for packages that are loaded already or not installed.
    """
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _DeferredModule
        sys.meta_path.insert(0, _SubmoduleFinder(cast(_DeferredModule, module)))
        sys.modules[package] = module
