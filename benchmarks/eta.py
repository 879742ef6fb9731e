"""Measure the accuracy of the ETA of `madgen status`: `python benchmarks/eta.py [--panoramas 120] [--processes 1]`.

Reads the status of a run on the demo backbone every second. Prints, by tenths of the dataset, the ratio of the
estimated to the true remaining time, and how often the true time lies in the reported interval.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measured_commands import ROOT, environment

from madgen.dataset.layout import DatasetDir
from madgen.monitoring.status import settled, status

JOB = ["configs/backbone/demo.yaml", "configs/method/mad.yaml", "prompts.source=jobs/prompts/demo.txt",
       "sampling.width=384", "sampling.num_inference_steps=10", "output.samples_per_shard=10",
       "monitor.wandb.mode=disabled"]  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """An estimate of `madgen status`."""

    time: float
    share: float
    """Fraction of the dataset that is complete."""
    left_s: float
    interval_s: list[float] | None


def watch(panoramas: int, processes: int) -> list[Estimate]:
    """Return the estimates of a whole run; the last one is that of its end."""
    each = [f"prompts.limit={min(24, panoramas)}", f"prompts.samples_per_prompt={max(1, panoramas // 24)}"]
    estimates: list[Estimate] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = DatasetDir(Path(folder, "out"))
        job = [*JOB, *each, f"output.dir={directory.root}", f"trainer.devices={processes}"]
        command = [sys.executable, "-m", "madgen", "generate", *job]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if directory.manifest.exists():
                state = status(directory)
                if state["eta_s"] is not None:
                    share = settled(state) / state["planned"]
                    estimates.append(Estimate(time.monotonic(), share, state["eta_s"], state["eta_interval_s"]))
                if state["complete"]:
                    process.wait()
                    break
            time.sleep(1)
        if process.returncode != 0:
            raise SystemExit(f"madgen generate: exit status {process.returncode}")
    return estimates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--panoramas", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    estimates = watch(options.panoramas, options.processes)
    end = estimates[-1].time
    print(f"{options.panoramas} panoramas, {options.processes} process(es), {end - estimates[0].time:.0f} s\n")
    print("| complete, % | remaining, s | estimate over true: min | max | in the interval, % |\n|---|---|---|---|---|")
    for tenth in range(10):
        of_tenth = [
            estimate for estimate in estimates if tenth <= 10 * estimate.share < tenth + 1 and estimate.time < end
        ]
        if of_tenth:
            print(row(tenth, of_tenth, end))


def row(tenth: int, estimates: list[Estimate], end: float) -> str:
    """Return the row of one tenth of the dataset."""
    ratios = [estimate.left_s / (end - estimate.time) for estimate in estimates]
    intervals = [(estimate.interval_s, end - estimate.time) for estimate in estimates if estimate.interval_s]
    covered = [interval[0] <= true <= interval[1] for interval, true in intervals]
    inside = f"{100 * sum(covered) / len(covered):.0f}" if covered else "–"
    left = f"{end - estimates[0].time:.0f} to {end - estimates[-1].time:.0f}"
    return f"| {10 * tenth} to {10 * tenth + 10} | {left} | {min(ratios):.2f} | {max(ratios):.2f} | {inside} |"


if __name__ == "__main__":
    main()
