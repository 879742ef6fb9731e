"""Measure the memory of an evaluation: `python benchmarks/metrics_memory.py DIR [--panoramas 1000]`.

Writes synthetic 64x256 px panoramas and square reference images to DIR, evaluates them with an untrained CLIP
(clip_score, coherence, fid, kid, giqa), and prints the peak resident memory after each tenth of the pass.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from measured_commands import ROOT

from madgen.dataset.format import Manifest, PlanTotals
from madgen.dataset.layout import DatasetDir
from madgen.evaluation import metric_columns
from madgen.evaluation.evaluate import Evaluation, evaluate
from madgen.metrics.crops import Crops
from madgen.metrics.extractors import Extractors, parse

sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT / "tools"))
from demo_backbone.scenes import vocabulary
from demo_backbone.tokenizer import build_tokenizer
from demo_backbone.train_clip import new_clip, save_clip
from synthetic import write_shard

PROMPTS = ("mountains", "the sea", "hills at noon", "a forest")
METRICS = ("clip_score", "coherence", "fid", "kid", "giqa")


def peak_mb() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_dataset(folder: Path, count: int, width: int, per_shard: int = 50) -> DatasetDir:
    """Write a finished dataset of noise images, 64 px high."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width)
    for start in range(0, count, per_shard):
        prompts = {number: number * len(PROMPTS) // count for number in range(start, min(start + per_shard, count))}
        samples = [
            (f"p{prompt}-{number:04d}", PROMPTS[prompt], rng.integers(0, 256, (64, width, 3), dtype=np.uint8))
            for number, prompt in prompts.items()
        ]
        write_shard(folder, f"noise-{start // per_shard:06d}", samples)
    plan = PlanTotals(len(PROMPTS), count, -(-count // per_shard), per_shard, "")
    (folder / "dataset.json").write_bytes(Manifest("noise", {"name": "noise"}, plan).to_json())
    return DatasetDir(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--panoramas", type=int, default=1000)
    options = parser.parse_args()
    directory = write_dataset(options.folder / f"panoramas-{options.panoramas}", options.panoramas, 256)
    squares = write_dataset(options.folder / "squares", 200, 64)
    clip = options.folder / "clip"
    clip.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary(), clip)
    save_clip(new_clip(tokenizer), tokenizer, clip)
    networks = Extractors(parse(f"{clip},vgg=random"), torch.device("cpu"))
    parts = options.folder / f"parts-{time.time_ns()}"
    started, counting = time.monotonic(), metric_columns.counting

    @contextmanager
    def show_memory(description: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0
        with counting(description, total) as advance:

            def advance_and_print(count: int) -> None:
                nonlocal done
                done += count
                advance(count)
                if done % max(total // 10, 1) < count:
                    print(f"{description}, {done} images: peak {peak_mb():.0f} MB", flush=True)

            yield advance_and_print

    metric_columns.counting = show_memory
    evaluate(Evaluation(directory, squares, METRICS, networks, Crops(64), parts, parts / "squares"))
    print(f"report: peak {peak_mb():.0f} MB, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
