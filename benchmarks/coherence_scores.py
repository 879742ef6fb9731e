"""Scores of the coherence study: how coherent a panorama of the demo backbone is, measured from its pixels.

Images are uint8 [H, W, 3]. A crop is a square the size of a view; crops do not overlap.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from demo_backbone.scenes import FARS, GROUNDS, HORIZONS, SIZE, TIMES, Scene, draw

VERSION = 2
"""Raise it when the meaning of a score changes, to recompute cached scores."""
CELL = 8
"""Pixels per latent cell of the demo backbone."""
HORIZON_RANGE = (0.33, 0.80)
"""Range of horizons to search, as shares of the height; scenes are drawn with 0.375 to 0.745."""


def crops(image: np.ndarray, size: int = SIZE) -> list[np.ndarray]:
    """Split an image into square crops along its longer side."""
    axis = 1 if image.shape[1] >= image.shape[0] else 0
    count = image.shape[axis] // size
    return np.split(image[: count * size] if axis == 0 else image[:, : count * size], count, axis=axis)


def band_colours(image: np.ndarray) -> np.ndarray:
    """Return the mean colours of the top and bottom quarter, sky and ground [2, 3], 0..255."""
    quarter = len(image) // 4
    return np.stack([image[:quarter].mean(axis=(0, 1)), image[-quarter:].mean(axis=(0, 1))])


def horizon(image: np.ndarray) -> float:
    """Return the row of the horizon as a share of the height, from the top.

    It is the row where the median over columns changes most: ridges, towers and trees change different rows in
    different columns, the horizon the same row in all.
    """
    change = np.abs(np.median(np.diff(image.astype(np.float32), axis=0), axis=1)).sum(axis=-1)
    first, last = (int(share * len(image)) for share in HORIZON_RANGE)
    return (first + int(change[first:last].argmax()) + 1) / len(image)


@lru_cache
def _templates() -> tuple[list[Scene], np.ndarray]:
    """Return two drawn scenes for every combination of attributes, and their row colours [N, H, 3]."""
    scenes = 2 * [Scene(*values) for values in itertools.product(TIMES, FARS, GROUNDS, HORIZONS)]
    images = (draw(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes))
    return scenes, np.stack([_profile(image) for image in images])


def _profile(image: np.ndarray) -> np.ndarray:
    """Return the median colour of each row [H, 3], which trees and clouds do not affect."""
    return np.median(image.astype(np.float32), axis=1)


def classify(crop: np.ndarray) -> Scene:
    """Return the drawn scene with the nearest row colours; its time, ground and horizon are reliable."""
    scenes, profiles = _templates()
    return scenes[int(np.abs(profiles - _profile(crop)).mean(axis=(1, 2)).argmin())]


def spread(image: np.ndarray) -> dict[str, float]:
    """Return how much the crops of an image differ; 0 is fully coherent.

    `sky`, `ground`: standard deviation of their mean colours, 0..255. `horizon`: standard deviation of its height in
    percent. `time`: percentage of pairs of crops with different times of day.
    """
    parts = crops(image)
    sky, ground = np.std([band_colours(part) for part in parts], axis=0).mean(axis=-1)
    times = [classify(part).time for part in parts]
    pairs = list(itertools.combinations(times, 2))
    return {
        "sky": float(sky),
        "ground": float(ground),
        "horizon": 100 * float(np.std([horizon(part) for part in parts])),
        "time": 100 * float(np.mean([one != other for one, other in pairs])),
    }


def caption_match(image: np.ndarray, named: Mapping[str, str]) -> float | None:
    """Return the percentage of the caption's attributes that crops show; None if it has none."""
    guesses = [classify(part) for part in crops(image)]
    right = [getattr(guess, name) == value for guess in guesses for name, value in named.items()]
    return 100 * float(np.mean(right)) if right else None


def summary(image: np.ndarray) -> list[float]:
    """Return mean sky and ground colours and the horizon in percent [7], for `variety`."""
    parts = crops(image)
    colours = np.mean([band_colours(part) for part in parts], axis=0)
    return [*map(float, colours.ravel()), 100 * float(np.mean([horizon(part) for part in parts]))]


def variety(summaries: list[list[float]]) -> dict[str, float]:
    """Return the standard deviations between panoramas of one prompt, in the units of `summary`."""
    deviations = np.std(summaries, axis=0, ddof=1)
    return {
        "colour": float(deviations[:6].mean()),
        "horizon": float(deviations[6]),
    }


def column_steps(image: np.ndarray) -> np.ndarray:
    """Return the mean absolute colour difference of neighbouring columns [W - 1]."""
    return np.abs(np.diff(image.astype(np.float32), axis=1)).mean(axis=(0, 2))


def seam(image: np.ndarray, columns: Sequence[int]) -> float:
    """Return the step at these columns over that at the borders of neighbouring latent cells; 1 is no seam.

    Comparing borders of cells with others nearby cancels the decoder's effect and the scene's content. The seams of a
    vertical image lie between rows.
    """
    if image.shape[0] > image.shape[1]:
        image = image.transpose(1, 0, 2)
    steps = _steps_across(image)
    beside = [column + offset * CELL for column in columns for offset in (-2, -1, 1, 2)]
    beside = [column for column in beside if 0 < column < image.shape[1] and column not in columns]
    return float(steps[list(columns)].mean() / steps[beside].mean())


def _steps_across(image: np.ndarray) -> np.ndarray:
    """Return for each column the difference of the half cells before and after it [W].

    The decoder blurs a step between latent cells over some columns, and unlike a seam, texture varies from row to row:
    so means over half a cell and over a cell's rows are compared.
    """
    half = CELL // 2
    bands = image.astype(np.float32).reshape(-1, CELL, image.shape[1], 3).mean(axis=1)
    means = np.cumsum(np.pad(bands, ((0, 0), (1, 0), (0, 0))), axis=1)
    means = (means[:, half:] - means[:, :-half]) / half  # [rows, W - half + 1, 3], from that column on
    steps = np.zeros(image.shape[1], np.float32)
    steps[half:-half] = np.abs(means[:, half:-1] - means[:, : -half - 1]).mean(axis=(0, 2))
    return steps


def fine_energy(image: np.ndarray) -> float:
    """Return the mean power of a crop's brightness at periods below two latent cells, the finest that latents have.

    Averages of views that disagree lose this energy. Crops are windowed, so that their borders count for nothing.
    """
    window = np.outer(np.hanning(SIZE), np.hanning(SIZE))
    frequencies = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None])
    fine, powers = frequencies >= 1 / (2 * CELL), []
    for crop in crops(image):
        grey = crop.astype(np.float64).mean(axis=2)
        spectrum = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
        powers.append(spectrum[fine].sum() / (SIZE * SIZE * (window**2).sum()))
    return float(np.mean(powers))


def wrap_ratio(image: np.ndarray) -> float:
    """Return the step from the last column to the first over the mean step; 1 is a closed panorama."""
    across = np.abs(image[:, 0].astype(np.float32) - image[:, -1]).mean()
    return float(across / column_steps(image).mean())


def closure(images: Sequence[np.ndarray], period: int) -> float:
    """Return the step from the last column to the first over that at every other `period`-th column, of all images.

    With the views' stride as period, only borders of views are compared, and the ratio of closed loops is about 1.
    """
    around = [np.abs(image.astype(np.float32) - np.roll(image, 1, axis=1)).mean(axis=(0, 2)) for image in images]
    return float(np.mean([steps[0] for steps in around]) / np.mean([steps[period::period] for steps in around]))


def score(image: np.ndarray, named: Mapping[str, str], shift: int, last_shift: int) -> dict[str, object]:
    """Return all scores of an image whose caption names the attributes `named`.

    Borders of views lie every `shift` pixels, those of the last step at `last_shift` plus multiples of a view's size.
    """
    extent = max(image.shape[:2])
    return {
        **spread(image),
        "caption": caption_match(image, named),
        "seam": seam(image, range(shift, extent, shift)),
        "last seam": seam(image, range(last_shift or SIZE, extent, SIZE)),
        "wrap": wrap_ratio(image),
        "summary": summary(image),
    }
