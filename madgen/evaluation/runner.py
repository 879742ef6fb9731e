"""One pass over a dataset: every picture is read once, whatever is computed of it. Knows no engine and no Lightning.

Each process takes every n-th shard. What it finds goes into files (`parts`), so that a pass which was stopped goes on,
and the numbers depend neither on the order of shards nor on the number of processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry
from madgen.evaluation.partial_results import Column, ShardPart, shard_parts
from madgen.metrics.crops import Crops, Picture
from madgen.utils.console import say
from madgen.utils.errors import UserError

LOG_EVERY_S = 30.0
LOOK_EVERY_S = 0.2
PATIENCE_S = 300.0
"""When nothing was heard of the others for so long, their shards are taken over."""


@dataclass(frozen=True)
class Place:
    """This process among those that were started with it, by torchrun or srun."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Place:
        """From the environment."""
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if os.environ.get(rank) and os.environ.get(world):
                return cls(int(os.environ[rank]), int(os.environ[world]))
        return cls()


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU, or else the CPU; UserError for one that is not there."""
    if name == "auto":
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        count = torch.cuda.device_count()
        return torch.device("cuda", local % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


@dataclass
class Bar:
    """A bar on a terminal, plain lines in a log file."""

    what: str
    total: int
    done: int = 0
    due: float = field(default_factory=lambda: time.monotonic() + LOG_EVERY_S)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.progress.add_task(self.what, total=self.total)
            self.progress.start()

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done)
        elif time.monotonic() >= self.due:
            self.due = time.monotonic() + LOG_EVERY_S
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.what}: {self.done}/{self.total} panoramas")

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def measure(
    directory: DatasetDir,
    columns: Sequence[Column],
    folder: Path,
    crops: Crops,
    batch: int = 8,
    place: Place | None = None,
) -> bool:
    """Computes what is missing of the columns, `batch` pictures at once; True where all of it is there at the end.

    Rank 0 waits for the others, and takes over what they leave. The others return when their part is done.
    """
    place = Place.here() if place is None else place
    parts = list(shard_parts(directory, folder))
    mine = [part for part in parts[place.rank :: place.world] if part.missing(columns)]
    theirs = [part for number, part in enumerate(parts) if number % place.world != place.rank]
    bar = Bar(f"scores of {directory.root}", sum(len(part.entries) for part in mine))
    try:
        with same_numbers():
            for part in mine:
                _measure_shard(part, columns, crops, batch, bar)
            if place.rank == 0:
                _wait(theirs, columns, crops, batch, bar)
    finally:
        bar.stop()
    return not any(part.missing(columns) for part in parts)


@contextmanager
def same_numbers() -> Iterator[None]:
    """float32 means float32, on GPUs too."""
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


def _measure_shard(part: ShardPart, columns: Sequence[Column], crops: Crops, batch: int, bar: Bar) -> None:
    missing = part.missing(columns)
    found: list[list[np.ndarray]] = [[] for _ in missing]
    for start in range(0, len(part.entries), batch):
        pictures = [_read(part, entry, crops) for entry in part.entries[start : start + batch]]
        for values, column in zip(found, missing, strict=True):
            values.append(column.compute(pictures))
        bar.advance(len(pictures))
    for values, column in zip(found, missing, strict=True):
        part.write(column, np.concatenate(values))


def _read(part: ShardPart, entry: dict, crops: Crops) -> Picture:
    sample = read_entry(part.directory, part.shard, entry)
    return Picture(entry["key"], sample.metadata["prompt"], sample.image_HWC, crops)


def _wait(theirs: Sequence[ShardPart], columns: Sequence[Column], crops: Crops, batch: int, bar: Bar) -> None:
    heard, left = time.monotonic(), len(theirs)
    while missing := [part for part in theirs if part.missing(columns)]:
        if len(missing) < left:
            heard, left = time.monotonic(), len(missing)
        elif time.monotonic() - heard > PATIENCE_S:
            say(f"madgen: nothing was heard of the other processes for {PATIENCE_S:.0f} s; taking over {left} shards")
            _measure_shard(missing[0], columns, crops, batch, bar)
        time.sleep(LOOK_EVERY_S)
