"""Read each folder of a pipeline once per process; diffusers returns a copy for each load.

Loading takes longer than most tests' sampling. Forks and interpreters that tests start read the files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def files_of(folder: Path) -> list[tuple]:
    """Return what changes when a file does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]


@pytest.fixture(scope="session")
def pipelines_are_read_once() -> Iterator[None]:
    """Replace `from_pretrained` of pipelines, for folders and options without objects."""
    import torch
    from diffusers import DiffusionPipeline

    real, loaded = DiffusionPipeline.__dict__["from_pretrained"], {}
    plain = (str, int, float, type(None), torch.dtype)

    def from_pretrained(cls: type, folder: Any, **options: Any) -> Any:
        if not Path(folder).is_dir() or not all(isinstance(value, plain) for value in options.values()):
            return real.__get__(None, cls)(folder, **options)
        key = repr((cls, files_of(Path(folder)), sorted(options.items(), key=lambda option: option[0])))
        if key not in loaded:
            loaded[key] = real.__get__(None, cls)(folder, **options)
        return copy.deepcopy(loaded[key])

    DiffusionPipeline.from_pretrained = classmethod(from_pretrained)
    yield
    DiffusionPipeline.from_pretrained = real
