"""Compare refined panoramas with plain enlargement: `python benchmarks/upscale.py out/demo out/upscale`.

High-frequency energy is the mean power of the gray image above half of the Nyquist frequency, in crops of a view. The
Fréchet distance is that of features of the demo's CLIP, between such crops and those of the source.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry
from madgen.demo import CLIP_WEIGHTS
from madgen.metrics.fid import distance
from madgen.models.clip import load

CROP, STEP = 128, 64
"""Pixels: a view of the demo backbone, and half of it."""


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Return the finished panoramas of a dataset by key."""
    dataset = DatasetDir(folder)
    return {entry.key: read_entry(dataset, entry).image_HWC for entry in dataset.entries()}


def crops(image: np.ndarray) -> list[np.ndarray]:
    """Return crops of a view's size, half a view apart."""
    tops, lefts = (range(0, extent - CROP + 1, STEP) for extent in image.shape[:2])
    return [image[top : top + CROP, left : left + CROP] for top in tops for left in lefts]


def high_frequency_energy(crop: np.ndarray) -> float:
    """Return the mean power above half of the Nyquist frequency, in squared gray levels."""
    gray = crop.mean(2)
    power = np.abs(np.fft.fft2(gray * np.outer(np.hanning(CROP), np.hanning(CROP)))) ** 2 / CROP**2
    frequencies = np.fft.fftfreq(CROP)
    return float(power[np.hypot(*np.meshgrid(frequencies, frequencies)) > 0.25].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("refined", type=Path, nargs="+")
    arguments = parser.parse_args()
    source, clip = pictures(arguments.source), load(str(CLIP_WEIGHTS))
    refined = {folder.name: pictures(folder) for folder in arguments.refined}
    keys = set.intersection(set(source), *map(set, refined.values()))

    def row(name: str, images: list[np.ndarray]) -> np.ndarray:
        parts = [part for image in images for part in crops(image)]
        features = clip.features(parts).numpy()
        energy = np.mean([high_frequency_energy(part) for part in parts])
        print(f"| {name} | {energy:.3f} | {distance(features, reference):.2f} |")
        return features

    reference = clip.features([part for image in source.values() for part in crops(image)]).numpy()
    print(f"{len(keys)} panoramas\n\n| | high-frequency energy | Fréchet distance |\n|---|---|---|")
    row("source", [source[key] for key in keys])
    enlarged = []
    for key in sorted(keys):
        image = Image.fromarray(source[key])
        enlarged.append(np.asarray(image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS)))
    row("enlarged (Lanczos)", enlarged)
    for name, images in refined.items():
        row(name, [images[key] for key in sorted(keys)])


if __name__ == "__main__":
    main()
