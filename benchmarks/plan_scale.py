"""Measure time and memory of planning many prompts: `python benchmarks/plan_scale.py 10000000 txt parquet`.

Writes a file of unique captions (50 to 80 bytes each) to a temporary folder, runs `madgen plan` on it in a separate
process, and prints one row of a Markdown table per format.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measured_commands import Measured, measure

ROW_GROUP = 1 << 20  # pyarrow's default
FORMATS = ("txt", "jsonl", "csv", "parquet", "jsonl+id", "jsonl+seed")
SUBJECTS = ("a mountain lake", "an old harbour", "rolling dunes", "a night market", "terraced rice fields", "a glacier")
LIGHTS = ("at dawn", "at noon", "under heavy clouds", "in golden evening light", "by moonlight", "in thick fog")
STYLES = ("wide-angle photograph", "oil painting", "watercolour", "matte painting", "film still")


def captions(stop: int, start: int = 0) -> Iterator[str]:
    """Yield unique captions, the same ones in every run."""
    for number in range(start, stop):
        subject, light = SUBJECTS[number % 6], LIGHTS[number // 6 % 6]
        yield f"{subject} {light}, {STYLES[number // 36 % 5]}, view {number}"


def write_prompts(path: Path, kind: str, count: int) -> None:
    """Write a prompt file; `+id` and `+seed` add that field to each line."""
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
            for start in range(0, count, ROW_GROUP):
                writer.write_table(pa.table({"prompt": list(captions(min(count, start + ROW_GROUP), start))}))
        return
    with open(path, "w", encoding="utf-8") as stream:
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


def plan(folder: Path, source: Path) -> Measured:
    """Measure `madgen plan` on a prompt file."""
    job = folder / "job.yaml"
    job.write_text(
        f"backbone: {{pretrained: demo}}\nsampling: {{height: 128, width: 768}}\n"
        f"prompts: {{source: {json.dumps(str(source))}}}\noutput: {{samples_per_shard: 1000}}\n",
        encoding="utf-8",
    )
    return measure(["plan", job, "--json"], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=int, help="number of prompts")
    parser.add_argument("formats", nargs="*", default=["txt"], help=f"one or more of {', '.join(FORMATS)}")
    arguments = parser.parse_args()
    print("| format | prompts | file, MB | plan, s | CPU, s | peak RSS, MiB |\n|---|---|---|---|---|---|")
    for kind in arguments.formats:
        if kind not in FORMATS:
            parser.error(f"unknown format {kind!r}; known: {', '.join(FORMATS)}")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"prompts.{kind.partition('+')[0]}"
            write_prompts(source, kind, arguments.prompts)
            time.sleep(1)  # let writes to the disk finish
            cost = plan(Path(folder), source)
            size = source.stat().st_size / 1e6
        print(
            f"| {kind} | {arguments.prompts:,} | {size:.0f} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} "
            f"| {cost.peak_mb:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
