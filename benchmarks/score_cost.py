"""Measure the cost of scores during generation: `python benchmarks/score_cost.py DIR`, a finished dataset.

Compares the time of pixel scores on its images, on one core, with the time of sampling and decoding in its sidecars.
`--size 512x3072` times a random image of that size instead, with view borders every 128 px.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_sample
from madgen.images.scores import coherence, pixel_scores, seam, wrap

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Return the median of several runs after a warm-up."""
    work()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def time_dataset(directory: DatasetDir) -> None:
    """Print the milliseconds per panorama, and their share of sampling and decoding."""
    keys, samples, spent = [], 0, 0.0
    for sidecar in directory.sidecars():
        keys += [entry.key for entry in sidecar.samples]
        samples += sidecar.made
        spent += sum(sidecar.seconds.get(name, 0.0) for name in ("sample", "decode"))
    images = [read_sample(directory, key).image_HWC for key in keys[:16]]
    height, width = images[0].shape[:2]
    borders = list(range(height // 4, width, height // 4))
    score = partial(pixel_scores, ("seam", "wrap", "coherence"), rows=[], columns=borders, cell=8)
    each = sum(seconds(partial(score, image)) for image in images) / len(images)
    print(f"{height}x{width} px: scoring {1000 * each:.2f} ms, sampling and decoding {1000 * spent / samples:.0f} ms")
    print(f"scoring is {100 * each * samples / spent:.3f} % of that")


def time_size(height: int, width: int) -> None:
    """Print the milliseconds of each score."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    borders = list(range(128, width, 128))
    works = {
        "seam": lambda: seam(image, [], borders, 8),
        "wrap": lambda: wrap(image, 8),
        "coherence": lambda: coherence(image),
    }
    print(f"{height}x{width} px: " + ", ".join(f"{name} {1000 * seconds(work):.1f} ms" for name, work in works.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels")
    options = parser.parse_args()
    if options.size:
        time_size(*map(int, options.size.split("x")))
    elif options.directory:
        time_dataset(DatasetDir(options.directory))
    else:
        parser.error("DIR or --size is required")
