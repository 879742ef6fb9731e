"""Compare the speed of madgen with reference implementations: `python benchmarks/speed.py --gpu` (or `--cpu`).

Times madgen, the released MAD code (a checkout in the folder MAD_REFERENCE), diffusers' panorama pipeline, a bare UNet
on the same number of views, and direct inference, in alternation and with the same random weights, after comparing
their results. Each row is appended to `speed.jsonl` in --out (default: out/speed) as soon as it is measured;
`speed.md`, `speed.json` and `speed.png` are written from all rows, and again by `--report`. benchmarks/results contains
those of the documentation.

    --gpu --minutes 4       SD 2 and SDXL shapes in bfloat16, most important rows first, within the time limit
    --cpu                   tiny shape, one thread
    --cpu --shape sd2       SD 2 shape, one step at 512x1536 in float32: takes minutes
    --cpu --shape demo      demo backbone, without references: their views need 64 cells
    --dry                   smoke test with tiny shapes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from speed_report import write_report
from speed_rows import ROWS
from speed_setup import Bench

CPU_ROWS = ["equal", "eager", "multidiffusion", "parts", "generate"]
NEED_GPU = {"graphs"}
ON_CPU = {"tiny": CPU_ROWS, "sd2": ["eager", "parts"], "demo": ["eager", "compiled", "parts", "generate", "regions"]}


class OutOfTime(Exception):
    """A row exceeded its time limit."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    from madgen.backbones import silence_model_libraries

    silence_model_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "speed.jsonl"
    if not options.report:
        if not (options.gpu or options.threads == 0):
            torch.set_num_threads(options.threads)
        measure(options, log)
    write_report(log, options.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--shape", choices=ON_CPU, default="tiny", help="with --cpu")
    parser.add_argument("--minutes", type=float, default=4.0, help="time limit with --gpu")
    parser.add_argument("--rows", default="", help=f"comma-separated rows to measure: {','.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; 0: all cores")
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    options = parser.parse_args(arguments)
    if not (options.gpu or options.cpu or options.dry or options.report):
        parser.error("one of --cpu, --gpu, --dry or --report is required")
    if options.rounds < 1 or options.threads < 0:
        parser.error(f"--rounds must be >= 1 and --threads >= 0, got {options.rounds} and {options.threads}")
    if options.report and not (options.out / "speed.jsonl").exists():
        parser.error(f"--report: {options.out / 'speed.jsonl'} does not exist; name the folder of a run with --out")
    options.rows = options.rows.replace(" ", "")
    unknown = {row for row in options.rows.split(",") if row} - set(ROWS)
    if unknown:
        parser.error(f"--rows: unknown {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    if (unavailable := NEED_GPU & set(options.rows.split(","))) and (options.dry or not options.gpu):
        parser.error(f"--rows: {', '.join(unavailable)} needs a GPU: --gpu, and not --dry")
    if options.gpu and not options.dry and not torch.cuda.is_available():
        parser.error("--gpu: no GPU is available; --dry runs a smoke test without one")
    return options


def bench_of(options: argparse.Namespace) -> Bench:
    """Return the shapes and sizes for the options."""
    f32, half = torch.float32, torch.bfloat16
    if options.gpu and not options.dry:
        return Bench(
            torch.device("cuda"), "sd2", "sdxl", 512, 3072, (1024, 2048, 4096, 8192), (1024, 4096), options.rounds, 10,
            half, torch.float16,
        )  # fmt: skip
    cpu = torch.device("cpu")
    if options.dry:
        return Bench(
            cpu,
            "tiny",
            "tiny-xl",
            512,
            640,
            (640, 768),
            (512, 640),
            1,
            1,
            f32,
            f32,
            "aot_eager",
            panoramas=2,
            share=0.1,
        )
    width, steps = {"tiny": (1536, 2), "sd2": (1536, 1), "demo": (768, 10)}[options.shape]
    height = 128 if options.shape == "demo" else 512
    return Bench(cpu, options.shape, "", height, width, (), (0, 0), options.rounds, steps, f32, f32, panoramas=3)


def measure(options: argparse.Namespace, log: Path) -> None:
    """Measure rows and append each to the log."""
    started, bench = time.monotonic(), bench_of(options)
    requested = [row for row in options.rows.split(",") if row]
    every = [name for name in ROWS if name not in NEED_GPU or bench.device.type == "cuda"]
    names = requested or (every if options.gpu or options.dry else ON_CPU[options.shape])
    bounded = options.gpu and not options.dry
    run = {
        "run": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kind": "dry" if options.dry else "gpu" if options.gpu else f"cpu-{bench.shape}",
        "device": device_name(bench.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "size": f"{bench.height}x{bench.width}",
        "dtype": str(bench.dtype).removeprefix("torch."),
        "steps": bench.steps,
    }
    for name in names:
        function, limit = ROWS[name]
        left = 60 * options.minutes - (time.monotonic() - started)
        row: dict[str, Any] = {"row": name, **run}
        if bounded and left < min(limit, 25):
            row["failed"] = f"not run: only {left:.0f} s left"
        else:
            began = time.monotonic()
            row |= run_row(function, bench, int(min(limit, left)) if bounded else 0)
            row["took"] = time.monotonic() - began
        bench.known[name] = row
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key not in run}), flush=True)


def run_row(function: Any, bench: Bench, seconds: int) -> dict[str, Any]:
    """Return the result of a row or the reason of its failure; stop it after `seconds` (0: no limit)."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return dict(function(bench))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        traceback.print_exc(limit=-6, file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
