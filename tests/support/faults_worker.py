"""A worker of `faults.py`: `madgen generate` with a log of sampled seeds and, optionally, one failing call."""

from __future__ import annotations

import builtins
import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import madgen.cli.app
import madgen.dataset.shards.leases
import madgen.generation.run  # noqa: F401 -- patched in it
from madgen.generation import shard_pipeline
from madgen.sampling.sampler import PanoramaSampler

FINISHED = {"dataset.json", "shards", "index.parquet", "README.md", "samples"}
"""Files of a complete dataset besides its shards."""


class Error(IntEnum):
    """The errno of a failing call; `BUG`: an error that is not an OSError."""

    ENOSPC = errno.ENOSPC
    EIO = errno.EIO
    ESTALE = errno.ESTALE
    BUG = 0


@dataclass(frozen=True)
class Sabotage:
    """Makes the `number`-th call of `call` fail, counted from 1."""

    call: str
    number: int
    error: Error
    status: int = 3
    """Expected exit status."""

    @property
    def name(self) -> str:
        """Return the scenario's name in the table."""
        how = "an error that is no OSError" if self.error is Error.BUG else self.error.name
        return f"{self.call} number {self.number} fails: {how}"

    @classmethod
    def all(cls) -> list[Sabotage]:
        """Return one of each kind."""
        return [
            cls("write", 3, Error.ENOSPC),
            cls("fsync", 3, Error.EIO),
            cls("fsync", 4, Error.ENOSPC),
            cls("rename", 3, Error.ESTALE),  # of a tar
            cls("rename", 4, Error.ESTALE),  # of its sidecar
            cls("link", 2, Error.EIO),
            cls("encode", 4, Error.BUG, 1),
            cls("decode", 3, Error.BUG, 1),
        ]

    def install(self) -> None:
        """Replace the call in this process."""
        if self.call == "write":
            madgen.dataset.shards.writer.open = self._opens()  # type: ignore[attr-defined]
        elif self.call == "encode":
            shard_pipeline.encode_sample = self._breaks(shard_pipeline.encode_sample)
        elif self.call == "decode":
            PanoramaSampler.decode_pixels = self._breaks(PanoramaSampler.decode_pixels)  # type: ignore[method-assign]
        else:
            name = {"fsync": "fsync", "rename": "replace", "link": "link"}[self.call]
            setattr(os, name, self._breaks(getattr(os, name)))

    def _breaks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if self.call == "rename" and "workers" in str(arguments[0]):
                return function(*arguments, **options)  # heartbeats have no fixed number
            calls += 1
            if calls == self.number:
                raise RuntimeError("sabotage") if self.error is Error.BUG else OSError(self.error, "sabotage")
            return function(*arguments, **options)

        return call

    def _opens(self) -> Callable[..., Any]:
        """Return an `open` whose streams fail at the number-th flush overall."""
        flush = self._breaks(lambda: None)

        def opened(path: Any, mode: str = "r") -> Any:
            stream = builtins.open(path, mode)  # noqa: SIM115 -- its caller closes it
            return _Failing(stream, flush) if "x" in mode else stream

        return opened


class _Failing:
    """A stream that calls `ask` before each flush."""

    def __init__(self, stream: Any, ask: Callable[[], None]):
        self._stream, self._ask = stream, ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        self._ask()
        self._stream.flush()


def work(folder: Path, root: Path, sabotage: Sabotage | None, lease_s: float) -> None:
    """Run `madgen generate` on a dataset, and end the process with its status."""
    log = os.open(folder / f"{root.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sampled = os.open(folder / f"{root.name}.sampled", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sample = PanoramaSampler.sample_latents

    def logged(self: PanoramaSampler, batch: Any, *arguments: Any, **options: Any) -> Any:
        os.write(sampled, "".join(f"{seed}\n" for seed in batch.seeds).encode())
        return sample(self, batch, *arguments, **options)

    PanoramaSampler.sample_latents = logged  # type: ignore[method-assign]
    madgen.dataset.shards.leases.LEASE_S = lease_s
    madgen.dataset.shards.leases.HEARTBEAT_S = min(3.0, lease_s / 4)
    if sabotage is not None:
        sabotage.install()
    sys.argv = ["madgen", "generate", str(folder / "job.yaml"), f"output.dir={root}"]
    madgen.cli.app.main()
