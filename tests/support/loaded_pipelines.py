"""Read each folder of a pipeline once per process; diffusers returns a copy for each load.

Loading takes longer than most tests' sampling. Forks and interpreters that tests start read the files.
"""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def files_of(folder: Path) -> list[tuple]:
    """Return what changes when a file does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]


class Copied:
    """An object of which copies are made, four times as fast as by `copy.deepcopy`: pickled, except for its tensors."""

    copying: list[Any]
    """Tensors of the copy that is being made."""

    def __init__(self, original: object):
        import torch

        self.tensors: list[torch.Tensor] = []
        numbers: dict[int, int] = {}

        def refer(tensor: torch.Tensor) -> tuple:
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
            return Copied.tensor, (numbers[id(tensor)],)

        stream = io.BytesIO()
        pickler = pickle.Pickler(stream, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = copyreg.dispatch_table | dict.fromkeys((torch.Tensor, torch.nn.Parameter), refer)
        pickler.dump(original)
        self.pickled = stream.getvalue()

    @staticmethod
    def tensor(number: int) -> Any:
        return Copied.copying[number]

    def copy(self) -> Any:
        Copied.copying = [copy.deepcopy(tensor) for tensor in self.tensors]
        return pickle.loads(self.pickled)  # noqa: S301 -- pickled above


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
            loaded[key] = Copied(real.__get__(None, cls)(folder, **options))
        return loaded[key].copy()

    DiffusionPipeline.from_pretrained = classmethod(from_pretrained)
    yield
    DiffusionPipeline.from_pretrained = real
