"""madgen: a prompt list becomes a WebDataset of semantically coherent panoramas."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madgen.config import load_job
    from madgen.engine.datamodule import PromptDataModule
    from madgen.engine.module import PanoramaModule
    from madgen.engine.writer import ShardWriter
    from madgen.errors import UserError
    from madgen.sampler import PanoramaSampler
    from madgen.schema import Job
    from madgen.types import Box, MaskFile, Region

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Job",
    "MaskFile",
    "PanoramaModule",
    "PanoramaSampler",
    "PromptDataModule",
    "Region",
    "ShardWriter",
    "UserError",
    "load_job",
]

_HOMES = {
    "Job": "madgen.schema",
    "load_job": "madgen.config",
    "PanoramaModule": "madgen.engine.module",
    "PanoramaSampler": "madgen.sampler",
    "PromptDataModule": "madgen.engine.datamodule",
    "ShardWriter": "madgen.engine.writer",
    "UserError": "madgen.errors",
    "Box": "madgen.types",
    "MaskFile": "madgen.types",
    "Region": "madgen.types",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import madgen` loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'madgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
