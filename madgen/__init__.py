"""Generate WebDatasets of semantically coherent panoramas from lists of prompts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madgen.config.loader import load_job
    from madgen.config.schema import Job
    from madgen.generation.datamodule import PromptDataModule
    from madgen.generation.module import PanoramaModule
    from madgen.generation.writer import ShardWriter
    from madgen.sampling.sampler import PanoramaSampler
    from madgen.types import Box, MaskFile, Region
    from madgen.utils.errors import UserError

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

_MODULES = {
    "Job": "madgen.config.schema",
    "load_job": "madgen.config.loader",
    "PanoramaModule": "madgen.generation.module",
    "PanoramaSampler": "madgen.sampling.sampler",
    "PromptDataModule": "madgen.generation.datamodule",
    "ShardWriter": "madgen.generation.writer",
    "UserError": "madgen.utils.errors",
    "Box": "madgen.types",
    "MaskFile": "madgen.types",
    "Region": "madgen.types",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import madgen` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'madgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
