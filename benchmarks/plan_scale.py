"""How long a plan of many prompts takes, and how much memory: `python benchmarks/plan_scale.py 10000000 txt parquet`.

Builds a file of realistic captions (50 to 80 bytes each, all different) in a temporary folder, plans it in a process
of its own, as `madgen plan` does, and prints a line of a Markdown table for each format.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUP = 1 << 20  # rows of a Parquet row group: what pyarrow takes by default
FORMATS = ("txt", "jsonl", "csv", "parquet", "jsonl+id", "jsonl+seed")
SUBJECTS = ("a mountain lake", "an old harbour", "rolling dunes", "a night market", "terraced rice fields", "a glacier")
LIGHTS = ("at dawn", "at noon", "under heavy clouds", "in golden evening light", "by moonlight", "in thick fog")
STYLES = ("wide-angle photograph", "oil painting", "watercolour", "matte painting", "film still")

PLAN = """
import json, resource, sys, time
started = time.perf_counter()
sys.argv = ["madgen", "plan", *sys.argv[1:]]
from madgen.cli.app import main
try:
    main()
except SystemExit as stopped:
    code = stopped.code
seconds = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_SELF)
cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
print(json.dumps({"code": code, "seconds": seconds, "cpu": cpu, "peak_mib": peak}), file=sys.stderr)
"""


def captions(stop: int, start: int = 0) -> Iterator[str]:
    """Different captions, always the same ones."""
    for number in range(start, stop):
        subject, light = SUBJECTS[number % 6], LIGHTS[number // 6 % 6]
        yield f"{subject} {light}, {STYLES[number // 36 % 5]}, view {number}"


def write_prompts(path: Path, kind: str, count: int) -> None:
    """A prompt file; what is behind a `+` adds that field to each line."""
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
            for start in range(0, count, GROUP):
                writer.write_table(pa.table({"prompt": list(captions(min(count, start + GROUP), start))}))
        return
    with open(path, "w") as stream:
        if kind == "csv":
            stream.write("prompt\n")
        for number, caption in enumerate(captions(count)):
            if kind == "txt":
                stream.write(f"{caption}\n")
            elif kind == "csv":
                stream.write(f'"{caption}"\n')
            else:
                extra = {"id": f"p{number}"} if kind == "jsonl+id" else {"seed": number} if "+" in kind else {}
                stream.write(json.dumps({"prompt": caption, **extra}) + "\n")


def plan(folder: Path, source: Path) -> dict[str, float]:
    """Exit status, seconds, CPU seconds and peak resident MiB of `madgen plan` in a process of its own."""
    job = folder / "job.yaml"
    job.write_text(
        f"backbone: {{pretrained: demo}}\nsampling: {{height: 128, width: 768}}\n"
        f"prompts: {{source: {json.dumps(str(source))}}}\noutput: {{samples_per_shard: 1000}}\n"
    )
    command = [sys.executable, "-c", PLAN, str(job), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stderr.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=int, help="how many")
    parser.add_argument("formats", nargs="*", default=["txt"], help=f"of {', '.join(FORMATS)}")
    arguments = parser.parse_args()
    print("| format | prompts | file, MB | plan, s | of it CPU, s | peak RSS, MiB |\n|---|---|---|---|---|---|")
    for kind in arguments.formats:
        if kind not in FORMATS:
            parser.error(f"{kind!r} is none of {', '.join(FORMATS)}")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"prompts.{kind.partition('+')[0]}"
            write_prompts(source, kind, arguments.prompts)
            time.sleep(1)  # the disk settles
            figures = plan(Path(folder), source)
            size = source.stat().st_size / 1e6
        print(
            f"| {kind} | {arguments.prompts:,} | {size:.0f} | {figures['seconds']:.1f} "
            f"| {figures['cpu']:.1f} | {figures['peak_mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
