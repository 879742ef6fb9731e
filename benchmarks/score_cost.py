"""What scoring at generation time costs: `python -m benchmarks.score_cost DIR`, of a finished dataset of png files.

Times the scores of the pixels on its pictures, one core, against the time that its sidecars say sampling and decoding
took. `--size 512x3072` times a random picture of that size instead, with borders every 128 px.
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
    """The median of a few runs, after one that does not count."""
    work()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def of_dataset(directory: DatasetDir) -> None:
    """Prints seconds a panorama, and which share of its making they are."""
    keys, made, spent = [], 0, 0.0
    for sidecar in directory.sidecars():
        keys += [entry.key for entry in sidecar.samples]
        made += sidecar.made
        spent += sum(sidecar.seconds.get(name, 0.0) for name in ("sample", "decode"))
    images = [read_sample(directory, key).image_HWC for key in keys[:16]]
    height, width = images[0].shape[:2]
    borders = list(range(height // 4, width, height // 4))
    score = partial(pixel_scores, ("seam", "wrap", "coherence"), rows=[], columns=borders, cell=8)
    each = sum(seconds(partial(score, image)) for image in images) / len(images)
    print(f"{height}x{width} px: scoring {1000 * each:.2f} ms, sampling and decoding {1000 * spent / made:.0f} ms")
    print(f"scoring is {100 * each * made / spent:.3f} % of that")


def of_size(height: int, width: int) -> None:
    """Prints milliseconds of each score."""
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
    given = parser.parse_args()
    if given.size:
        of_size(*map(int, given.size.split("x")))
    elif given.directory:
        of_dataset(DatasetDir(given.directory))
    else:
        parser.error("give DIR or --size")
