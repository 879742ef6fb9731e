"""Commands measured in processes of their own, with the paths and the empty datasets that benchmarks need."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.format import to_json
from madgen.planning.resolved_run import ResolvedRun

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SCRIPT = """
import sys
from madgen.cli.app import main
try:
    main()
finally:
    print(next(line for line in open("/proc/self/status") if "VmHWM" in line), file=sys.stderr)
"""  # ru_maxrss would include the memory of the parent process


@dataclass(frozen=True)
class Measured:
    """Cost of one command."""

    seconds: float
    cpu_seconds: float
    peak_mb: float


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of a process with one thread that imports this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def measure(arguments: Iterable[object], folder: Path, script: str = SCRIPT) -> Measured:
    """Run `madgen` with these arguments in a folder; exit if it fails."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command[3:])}: exit status {done.returncode}\n{done.stderr}")
    return Measured(seconds, sum(after[:2]) - sum(before[:2]), int(done.stderr.split()[-2]) / 1024)


def new_dataset(
    root: Path, prompts: Iterable[str], sampling: Mapping[str, Any], output: Mapping[str, Any]
) -> ResolvedRun:
    """Write `prompts.txt`, `job.yaml` and `out/dataset.json` of a job on the demo backbone."""
    (root / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    job = {
        "backbone": {"pretrained": "demo"},
        "sampling": dict(sampling),
        "prompts": {"source": "prompts.txt"},
        "output": {"dir": f"{root.resolve()}/out", **output},
        "monitor": {"wandb": {"mode": "disabled"}},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (root / "job.yaml").write_bytes(to_json(job))
    run = ResolvedRun.of(load_job(root / "job.yaml")).on("cpu")
    manifest.create(run.directory, run.manifest)
    return run
