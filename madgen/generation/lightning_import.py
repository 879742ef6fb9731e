"""Let Lightning start without the parts of torchmetrics that it does not use, which take longer than torch itself.

torchmetrics imports the metrics of all domains at once, and with them torchvision, SciPy and PyTorch's compiler.
Lightning needs two of its classes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

NEEDED = {"Metric": "metric", "MetricCollection": "collections"}
"""Classes that Lightning imports, and their modules."""


class DeferredTorchmetrics(ModuleType):
    """torchmetrics with what is set on this object; the first access to something else executes the package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer_torchmetrics() -> None:
    """Import the classes of torchmetrics that Lightning needs, and the rest when it is used.

    Call it before Lightning's import. Without effect where torchmetrics is imported already, or arranged differently.
    """
    spec = find_spec("torchmetrics")
    if spec is None or "torchmetrics" in sys.modules:
        return
    module = module_from_spec(spec)
    module.__dict__["__version__"] = importlib.metadata.version("torchmetrics")
    module.__dict__["_logger"] = logging.getLogger("torchmetrics")
    sys.modules["torchmetrics"] = module
    try:
        importlib.import_module("torchmetrics.utilities")  # first, because it and `metric` import each other
        for name, submodule in NEEDED.items():
            setattr(module, name, getattr(importlib.import_module(f"torchmetrics.{submodule}"), name))
        module.__class__ = DeferredTorchmetrics
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
            del sys.modules[name]
