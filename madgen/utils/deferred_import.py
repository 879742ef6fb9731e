"""Import a library on first use, as Python 3.15's `lazy import` does.

`importlib.util.LazyLoader` is similar, but any `import` statement of the same module would load it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType
from typing import Any

StandIns = Mapping[str, Callable[[], Any]]
"""Attributes of a module that can be read before it is loaded: their names, and functions that return their values."""


class _DeferredModule(ModuleType):
    """A module in `sys.modules` that loads when an attribute is first read."""

    def __getattr__(self, name: str) -> Any:
        loader = _loader(self)
        if isinstance(loader, _DeferringLoader) and name in loader.stand_ins:
            return loader.stand_ins[name]()
        if name == "__path__":  # the import system asks whether this module is a package
            raise AttributeError(name)
        load(self.__name__)
        return ModuleType.__getattribute__(self, name)


def _loader(module: ModuleType) -> Any:
    assert module.__spec__ is not None
    return module.__spec__.loader


def is_loaded(name: str) -> bool:
    """Return whether a module is loaded, or is being loaded."""
    module = sys.modules.get(name)
    return module is not None and not isinstance(_loader(module), _DeferringLoader)


def when_loaded(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call a function with a deferred module once it is loaded, or now if it is loaded already."""
    with _finder.locks[name]:
        if is_loaded(name):
            action(sys.modules[name])
        else:
            _finder.actions.setdefault(name, []).append(action)


def load(name: str) -> ModuleType:
    """Import a module, deferred or not, and load it, after the deferred package that contains it."""
    module = import_module(name)
    with _finder.locks[name]:
        if isinstance(module, _DeferredModule):
            package = name.rpartition(".")[0]
            if package:
                load(package)
            loader = _loader(module)
            if isinstance(loader, _DeferringLoader):  # otherwise it is being loaded, and imports itself
                _load(module, loader.loader)
    return module


def _load(module: ModuleType, loader: Any) -> None:
    assert module.__spec__ is not None
    module.__spec__.loader = loader
    loader.exec_module(module)
    module.__class__ = ModuleType
    for action in _finder.actions.pop(module.__name__, []):
        action(module)


class _DeferringLoader(Loader):
    """Create a module with another loader, and execute it when it is used."""

    def __init__(self, loader: Any, stand_ins: StandIns):
        self.loader, self.stand_ins = loader, stand_ins

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _DeferredModule


class _LoadedModule(Loader):
    """Return a module that is loaded already, without executing it a second time."""

    def __init__(self, module: ModuleType):
        self.module, self.loader = module, _loader(module)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader


class _Finder(MetaPathFinder):
    """Defer some modules; load a deferred package before its other submodules."""

    def __init__(self) -> None:
        self.deferred: dict[str, StandIns] = {}
        self.independent: set[str] = set()
        self.locks: defaultdict[str, Any] = defaultdict(RLock)
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in self.deferred:
            others = [finder for finder in sys.meta_path if finder is not self]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
            if spec is not None and spec.loader is not None:
                spec.loader = _DeferringLoader(spec.loader, self.deferred[name])
            return spec
        package = name.rpartition(".")[0]
        if {name, package} & self.independent or not isinstance(sys.modules.get(package), _DeferredModule):
            return None
        load(package)  # which may import the submodule
        module = sys.modules.get(name)
        if module is None or module.__spec__ is None:
            return None
        module.__spec__.loader = _LoadedModule(module)
        return module.__spec__


_finder = _Finder()


def defer_import(name: str, stand_ins: StandIns | None = None, independent: Collection[str] = ()) -> None:
    """Make later `import name` statements load the module when an attribute is first read.

    Does nothing for modules that are loaded already.

    Args:
        name: A module, which need not be installed.
        stand_ins: Attributes that do not load the module.
        independent: Submodules that can be imported without loading the module; its own name stands for all of them.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if name not in sys.modules:
        _finder.deferred[name] = stand_ins or {}
        _finder.independent.update(independent)
