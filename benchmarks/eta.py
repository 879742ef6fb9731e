"""How right `status` is about the time left: `python benchmarks/eta.py [--panoramas 120] [--processes 1]`.

A run on the demo backbone is asked every second, from its files; each answer is held against the time at which the
dataset was complete. Prints the ratio of the time told to the true one, by tenths of the dataset, and how often the
true one lay in the interval that was told.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from madgen.dataset.layout import DatasetDir
from madgen.monitoring.status import settled, status

ROOT = Path(__file__).resolve().parent.parent
JOB = ["configs/backbone/demo.yaml", "configs/method/mad.yaml", "prompts.source=jobs/prompts/demo.txt",
       "sampling.width=384", "sampling.num_inference_steps=10", "output.samples_per_shard=10",
       "monitor.wandb.mode=disabled"]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What `status` told at a time."""

    time: float
    share: float
    """Of the dataset that was made."""
    left_s: float
    interval_s: list[float] | None


def watch(panoramas: int, processes: int) -> list[Answer]:
    """The answers over a whole run; the last one is of its end."""
    each = [f"prompts.limit={min(24, panoramas)}", f"prompts.samples_per_prompt={max(1, panoramas // 24)}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = DatasetDir(Path(folder, "out"))
        job = [*JOB, *each, f"output.dir={directory.root}", f"trainer.devices={processes}"]
        command = [sys.executable, "-m", "madgen", "generate", *job]
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if directory.manifest.exists():
                state = status(directory)
                if state["eta_s"] is not None:
                    share = settled(state) / state["planned"]
                    answers.append(Answer(time.monotonic(), share, state["eta_s"], state["eta_interval_s"]))
                if state["complete"]:
                    process.wait()
                    break
            time.sleep(1)
        if process.returncode != 0:
            raise SystemExit(f"the run ended with {process.returncode}")
    return answers


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--panoramas", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    answers = watch(given.panoramas, given.processes)
    end = answers[-1].time
    print(f"{given.panoramas} panoramas, {given.processes} process(es), {end - answers[0].time:.0f} s\n")
    print("| made, % | true time left, s | told over true: least | most | in the interval, % |\n|---|---|---|---|---|")
    for tenth in range(10):
        here = [answer for answer in answers if tenth <= 10 * answer.share < tenth + 1 and answer.time < end]
        if here:
            print(row(tenth, here, end))


def row(tenth: int, answers: list[Answer], end: float) -> str:
    """One line of the table: the answers while one tenth was made."""
    ratios = [answer.left_s / (end - answer.time) for answer in answers]
    told = [(answer.interval_s, end - answer.time) for answer in answers if answer.interval_s]
    held = [interval[0] <= true <= interval[1] for interval, true in told]
    inside = f"{100 * sum(held) / len(held):.0f}" if held else "–"
    left = f"{end - answers[0].time:.0f} to {end - answers[-1].time:.0f}"
    return f"| {10 * tenth} to {10 * tenth + 10} | {left} | {min(ratios):.2f} | {max(ratios):.2f} | {inside} |"


if __name__ == "__main__":
    main()
