"""Compute metric columns in one pass over a dataset, reading every image once.

Each process takes every n-th shard and writes its values to files (see `partial_results`). An interrupted pass can be
resumed, and the values depend neither on the order of the shards nor on the number of processes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry
from madgen.evaluation.partial_results import Column, ShardPart, shard_parts
from madgen.metrics.crops import CroppedImage, Crops
from madgen.utils.errors import UserError
from madgen.utils.progress import showing_progress
from madgen.utils.validation import environment_number

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30.0
POLL_EVERY_S = 0.2
TIMEOUT_S = 300.0
"""Rank 0 takes over the shards of the other ranks after this time without progress."""


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process among those started with it by torchrun or srun."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> RankInfo:
        """Read the variables of torchrun or SLURM; a process without them is alone."""
        for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if os.environ.get(rank) and os.environ.get(world_size):
                return cls(environment_number(os.environ, rank), environment_number(os.environ, world_size))
        return cls()


def pick_device(name: str) -> torch.device:
    """Return a device by name, or this rank's GPU, else the CPU, for `auto`; raise UserError if it is unavailable."""
    if name == "auto":
        local = environment_number(os.environ, "LOCAL_RANK" if os.environ.get("LOCAL_RANK") else "SLURM_LOCALID", 0)
        count = torch.cuda.device_count()
        return torch.device("cuda", local % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(" device type at start")[0]
        raise UserError(f"--device {name} is not available ({reason}); use for example auto, cpu or cuda") from error
    return device


@contextmanager
def counting(activity: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds finished images to the progress that is shown."""
    done = 0
    with showing_progress(activity, "images") as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done, total)

        yield advance


def compute_columns(
    directory: DatasetDir,
    columns: Sequence[Column],
    folder: Path,
    crops: Crops,
    batch: int = 8,
    ranks: RankInfo | None = None,
) -> bool:
    """Compute the missing values of the columns, `batch` images at a time; return True if all are complete.

    Rank 0 waits for the other ranks and takes over their shards on a timeout. The others return after their share.
    """
    ranks = ranks or RankInfo.from_environment()
    parts = list(shard_parts(directory, folder))
    own = [part for part in parts[ranks.rank :: ranks.world_size] if part.missing(columns)]
    with counting(f"evaluating {directory.root}", sum(len(part.entries) for part in own)) as advance:

        def compute(part: ShardPart) -> None:
            missing = part.missing(columns)
            values: list[list[np.ndarray]] = [[] for _ in missing]
            for start in range(0, len(part.entries), batch):
                images = [read_image(directory, entry, crops) for entry in part.entries[start : start + batch]]
                for chunks, column in zip(values, missing, strict=True):
                    chunks.append(column.compute(images))
                advance(len(images))
            for chunks, column in zip(values, missing, strict=True):
                part.write(column, np.concatenate(chunks))

        with exact_float32():
            for part in own:
                compute(part)
            if ranks.rank == 0:
                others = [part for number, part in enumerate(parts) if number % ranks.world_size]
                _wait(others, columns, compute)
    return not any(part.missing(columns) for part in parts)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disable gradients, TF32 and nondeterministic cuDNN algorithms."""
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


def read_image(directory: DatasetDir, entry: SampleEntry, crops: Crops) -> CroppedImage:
    """Read the sample of a sidecar entry."""
    sample = read_entry(directory, entry)
    return CroppedImage(entry.key, sample.metadata["prompt"], sample.image_HWC, crops)


def _wait(parts: Sequence[ShardPart], columns: Sequence[Column], compute: Callable[[ShardPart], None]) -> None:
    progressed, left = time.monotonic(), len(parts)
    while missing := [part for part in parts if part.missing(columns)]:
        if len(missing) < left:
            progressed, left = time.monotonic(), len(missing)
        elif time.monotonic() - progressed > TIMEOUT_S:
            logger.warning("no progress of the other processes for %.0f s; taking over %d shards", TIMEOUT_S, left)
            compute(missing[0])
        time.sleep(POLL_EVERY_S)
