"""Measure the cost of monitoring within one run: `python benchmarks/monitor_share.py [--panoramas 24]`.

Runs the demo job with an offline W&B run and a preview of every fifth panorama, and adds up the CPU time of importing
W&B, of the observers in the writing thread, of W&B's thread, and of the process that W&B starts. Unlike a comparison of
two runs the result does not depend on the load of the machine.
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

from measured_commands import ROOT

SPENT: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Add up the CPU time that a function spends in its thread."""

    def call(*arguments: Any) -> Any:
        before = time.thread_time()
        try:
            return function(*arguments)
        finally:
            SPENT[name] += time.thread_time() - before

    return call


def cpu_time_of_children() -> float:
    """Return the CPU time of running child processes."""
    fields = (
        Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        for children in Path("/proc/self/task").glob("*/children")
        for child in children.read_text(encoding="utf-8").split()
    )
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panoramas", type=int, default=24, help="at most 24")
    options = parser.parse_args()
    before = time.thread_time()
    from madgen.monitoring.wandb_run import WandbRun

    SPENT["import of W&B"] = time.thread_time() - before
    from madgen.cli.app import main as madgen
    from madgen.monitoring.observer import Observer
    from madgen.monitoring.progress import ProgressReport

    WandbRun._work = counted("W&B's thread", WandbRun._work)  # type: ignore[method-assign]
    for observer in (WandbRun, ProgressReport):
        for event in vars(Observer).keys() & vars(observer).keys():
            if not event.startswith("_"):
                setattr(observer, event, counted("observers", getattr(observer, event)))
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_DIR"] = folder
        job = ["jobs/demo.yaml", f"output.dir={folder}/out", f"prompts.limit={options.panoramas}"]
        sys.argv = ["madgen", "generate", *job, "monitor.preview_every=5", "trainer.devices=1"]
        try:
            madgen()
        except SystemExit as stopped:
            if stopped.code:
                raise
    SPENT["W&B's process"] = cpu_time_of_children()
    total, monitoring = time.process_time() + SPENT["W&B's process"], sum(SPENT.values())
    for name, seconds in SPENT.items():
        print(f"{name}: {seconds:.2f} s")
    print(f"{monitoring:.2f} of {total:.1f} s of CPU time: {100 * monitoring / total:.2f} %")


if __name__ == "__main__":
    main()
