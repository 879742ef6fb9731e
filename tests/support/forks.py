"""Processes that need no nine seconds for their imports, forked from a server that has imported everything.

They are real processes, which can be stopped and killed.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
"""Its `Process`, once `serve` was called."""
CONTEXT.set_forkserver_preload(["warm"])
FOLDERS = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]


def serve() -> None:
    """Starts the server, if it does not run, with one thread, no hub and nothing that would steer a run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    paths = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    with _environment({**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}):
        multiprocessing.forkserver.ensure_running()


@contextmanager
def _environment(new: dict[str, str]) -> Iterator[None]:
    old = dict(os.environ)
    os.environ.clear()
    os.environ.update(new)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)
