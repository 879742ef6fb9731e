"""What watching costs, within one run: `python benchmarks/monitor_share.py [--panoramas 24]`.

A run of the demo job with an offline W&B run and a preview of every fifth panorama, in which the processor time of the
threads that watch is counted: importing W&B, what observers do in the writing thread, W&B's own thread, and the
process that W&B starts. Unlike a
comparison of two runs (`demo_job.py monitoring`) this is the same on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPENT: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose processor time in its own thread is added up under `name`."""

    def call(*arguments: Any) -> Any:
        before = time.thread_time()
        try:
            return function(*arguments)
        finally:
            SPENT[name] += time.thread_time() - before

    return call


def of_children() -> float:
    """Processor time of the processes that this one has started and that still run."""
    fields = (
        Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        for children in Path("/proc/self/task").glob("*/children")
        for child in children.read_text().split()
    )
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Runs the job and prints seconds of processor time, and their share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--panoramas", type=int, default=24, help="of at most 24")
    given = parser.parse_args()
    before = time.thread_time()
    from madgen.monitoring.wandb_run import WandbRun

    SPENT["import of W&B"] = time.thread_time() - before
    from madgen.cli import app as cli
    from madgen.generation.writer import ShardWriter

    WandbRun._work = counted("W&B's thread", WandbRun._work)  # type: ignore[method-assign]
    ShardWriter._tell = counted("writing thread", ShardWriter._tell)  # type: ignore[method-assign]
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_DIR"] = folder
        job = ["jobs/demo.yaml", f"output.dir={folder}/out", f"prompts.limit={given.panoramas}"]
        sys.argv = ["madgen", "generate", *job, "monitor.preview_every=5", "trainer.devices=1"]
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise
    SPENT["W&B's process"] = of_children()
    total, watching = time.process_time() + SPENT["W&B's process"], sum(SPENT.values())
    for name, seconds in SPENT.items():
        print(f"{name}: {seconds:.2f} s")
    print(f"{watching:.2f} of {total:.1f} s of processor time: {100 * watching / total:.2f} %")


if __name__ == "__main__":
    main()
