"""Compare methods at continuing a picture: `python benchmarks/outpaint.py out/demo [--prompt "a landscape panorama"]`.

The middle 128 px of each panorama, a view, are kept; the rest of 128x768 px is generated, with the same seed by each
method. Coherence is the mean absolute difference, in levels, between the mean colors of the kept part and of generated
parts of 64 px, separately for sky (the top quarter) and ground (the bottom quarter). `near` parts are within 96 px of
the kept one, `far` parts more than a view away, where no view of the kept part reaches them. Methods are compared in
pairs of equal picture and seed: mean difference and its standard error. `kept elsewhere` compares with the kept part
of the next panorama in the list, for what is due to chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from madgen import PanoramaSampler
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry

WIDTH, KEPT, FEATHER, PART, STEPS = 768, slice(320, 448), 16, 64, 20
METHODS = {"MultiDiffusion": 0, "MAD in every step": STEPS}
DISTANCES = {"near": range(96), "far": range(128, WIDTH)}
"""Pixels between the kept part and the middle of a generated one."""


def palette(pixels_HWC: np.ndarray) -> np.ndarray:
    """Return the mean colors of sky and ground, [2, 3]."""
    quarter = len(pixels_HWC) // 4
    return np.stack([part.mean((0, 1)) for part in (pixels_HWC[:quarter], pixels_HWC[-quarter:])])


def differences(image_HWC: np.ndarray, kept_HWC: np.ndarray) -> dict[str, float]:
    """Return the difference between the kept part and generated ones, by distance."""
    values: dict[str, list[float]] = {name: [] for name in DISTANCES}
    for left in range(0, WIDTH, PART):
        middle = left + PART // 2
        distance = KEPT.start - middle if middle < KEPT.start else middle - KEPT.stop
        part = palette(image_HWC[:, left : left + PART])
        for name, distances in DISTANCES.items():
            if distance in distances:
                values[name].append(float(np.abs(part - palette(kept_HWC)).mean()))
    return {name: float(np.mean(of_parts)) for name, of_parts in values.items()}


def mean_and_error(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1) / np.sqrt(len(values)):.1f}"


def report(scores: Mapping[str, list[dict[str, float]]]) -> None:
    """Print a table of the methods, and of their paired differences to the first one."""
    print(f"{len(next(iter(scores.values())))} pictures\n\n| | near | far |\n|---|---|---|")
    columns = {method: np.array([[one[name] for name in DISTANCES] for one in rows]) for method, rows in scores.items()}
    for method, values in columns.items():
        print(f"| {method} | {' | '.join(map(mean_and_error, values.T))} |")
    first, *others = METHODS
    for method in others:
        paired = columns[method] - columns[first]
        print(f"| {method} − {first}, paired | {' | '.join(map(mean_and_error, paired.T))} |")
        better = [f"{np.sum(column < 0)} of {len(column)}" for column in paired.T]
        print(f"| {method} is more coherent in | {' | '.join(better)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--prompt", help="prompt of all panoramas; default: that of each picture")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--output", type=Path, help="folder for the panoramas; existing ones are used")
    arguments = parser.parse_args()
    dataset = DatasetDir(arguments.source)
    entries = list(dataset.entries())[: arguments.pictures]
    images = [read_entry(dataset, entry).image_HWC for entry in entries]
    known = np.zeros((128, WIDTH), bool)
    known[:, KEPT] = True
    scores: dict[str, list[dict[str, float]]] = {}
    for name, steps in METHODS.items():
        overrides = [f"sampling.init.feather={FEATHER}"]
        sampler = PanoramaSampler.from_pretrained("demo", mad_steps=steps, dtype="float32", overrides=overrides)
        for number, (entry, image) in enumerate(zip(entries, images, strict=True)):
            path = None if arguments.output is None else arguments.output / f"{number}-{steps}.png"
            if path is None or not path.exists():
                (result,) = sampler.sample(
                    [arguments.prompt or entry.prompt], images=[image], masks=[known], strength=1.0,
                    seeds=[100 + number], num_inference_steps=STEPS, guidance_scale=3.0,
                )  # fmt: skip
            else:
                result = np.asarray(Image.open(path))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(result).save(path)
            scores.setdefault(name, []).append(differences(result, image[:, KEPT]))
            other = images[(number + 1) % len(images)][:, KEPT]
            scores.setdefault(f"{name}, kept elsewhere", []).append(differences(result, other))
    report(scores)


if __name__ == "__main__":
    main()
