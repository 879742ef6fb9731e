"""How coherent a picture of the demo backbone is, measured from its pixels alone.

Pictures are uint8 [H, W, 3], rows counted from the top. A crop is a square of the size of a view; crops do not overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from madgen.demo.scenes import FARS, GROUNDS, HORIZONS, SIZE, TIMES, Scene, draw

VERSION = 2
"""Raise it when a score changes its meaning: cached scores of another version are made again."""
CELL = 8
"""Pixels to a latent cell of the demo backbone."""
SEARCHED = (0.33, 0.80)
"""Share of the height between which a horizon may lie; scenes are drawn with theirs in 0.375 .. 0.745."""


def crops(image: np.ndarray, size: int = SIZE) -> list[np.ndarray]:
    """Square crops side by side, or above each other in a vertical picture."""
    axis = 1 if image.shape[1] >= image.shape[0] else 0
    count = image.shape[axis] // size
    return np.split(image[: count * size] if axis == 0 else image[:, : count * size], count, axis=axis)


def band_colours(image: np.ndarray) -> np.ndarray:
    """Mean colour of the top and of the bottom quarter of the rows: sky and ground [2, 3], 0..255."""
    quarter = len(image) // 4
    return np.stack([image[:quarter].mean(axis=(0, 1)), image[-quarter:].mean(axis=(0, 1))])


def horizon(image: np.ndarray) -> float:
    """Height of the horizon, as a share of the rows from the top.

    The row where the median column changes most: ridges, towers and trees change other rows in other columns, the
    horizon is one row in all of them.
    """
    change = np.abs(np.median(np.diff(image.astype(np.float32), axis=0), axis=1)).sum(axis=-1)
    first, last = (int(share * len(image)) for share in SEARCHED)
    return (first + int(change[first:last].argmax()) + 1) / len(image)


@lru_cache
def _templates() -> tuple[list[Scene], np.ndarray]:
    """Two drawn scenes for every combination of attributes, and their row colours [N, H, 3]."""
    scenes = 2 * [Scene(*values) for values in itertools.product(TIMES, FARS, GROUNDS, HORIZONS)]
    images = (draw(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes))
    return scenes, np.stack([_profile(image) for image in images])


def _profile(image: np.ndarray) -> np.ndarray:
    """The colour of each row: medians over the columns, which a tree or a cloud does not change [H, 3]."""
    return np.median(image.astype(np.float32), axis=1)


def classify(crop: np.ndarray) -> Scene:
    """The drawn scene whose row colours are nearest; its time, ground and horizon are worth trusting."""
    scenes, profiles = _templates()
    return scenes[int(np.abs(profiles - _profile(crop)).mean(axis=(1, 2)).argmin())]


def spread(image: np.ndarray) -> dict[str, float]:
    """How much the crops differ; 0 is a picture that agrees with itself.

    `sky`, `ground`: standard deviation of their mean colours, 0..255. `horizon`: standard deviation of its height, in
    percent of the rows. `time`: share of the pairs of crops that show another time of day, in percent.
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
    """Percent of what the caption names, over all crops, that is there to be seen; None if it names nothing."""
    guesses = [classify(part) for part in crops(image)]
    right = [getattr(guess, name) == value for guess in guesses for name, value in named.items()]
    return 100 * float(np.mean(right)) if right else None


def summary(image: np.ndarray) -> list[float]:
    """What the panorama shows as a whole, for `variety`: mean sky and ground colour, horizon in percent [7]."""
    parts = crops(image)
    colours = np.mean([band_colours(part) for part in parts], axis=0)
    return [*map(float, colours.ravel()), 100 * float(np.mean([horizon(part) for part in parts]))]


def variety(summaries: list[list[float]]) -> dict[str, float]:
    """How much panoramas of one prompt differ: standard deviations over their seeds, in the units of `summary`."""
    deviations = np.std(summaries, axis=0, ddof=1)
    return {
        "colour": float(deviations[:6].mean()),
        "horizon": float(deviations[6]),
    }


def column_steps(image: np.ndarray) -> np.ndarray:
    """Step from each column to the next, mean of the absolute colour differences [W - 1]."""
    return np.abs(np.diff(image.astype(np.float32), axis=1)).mean(axis=(0, 2))


def seam(image: np.ndarray, columns: Sequence[int]) -> float:
    """Step at these columns over that at the latent cells' borders up to two cells beside them; 1 is no seam.

    Compared are borders of cells with borders of cells near by, so that what the decoder does at each of them and what
    the scene holds there cancel. A vertical picture is turned: its seams lie between rows.
    """
    if image.shape[0] > image.shape[1]:
        image = image.transpose(1, 0, 2)
    steps = _steps_across(image)
    beside = [column + offset * CELL for column in columns for offset in (-2, -1, 1, 2)]
    beside = [column for column in beside if 0 < column < image.shape[1] and column not in columns]
    return float(steps[list(columns)].mean() / steps[beside].mean())


def _steps_across(image: np.ndarray) -> np.ndarray:
    """For each column x, how far the half cell from it on differs from the half cell before it [W].

    The decoder smears a step between two latent cells over some columns, and texture changes from row to row where
    a seam does not: so means over half a cell and over bands of a cell's rows are compared.
    """
    half = CELL // 2
    bands = image.astype(np.float32).reshape(-1, CELL, image.shape[1], 3).mean(axis=1)
    means = np.cumsum(np.pad(bands, ((0, 0), (1, 0), (0, 0))), axis=1)
    means = (means[:, half:] - means[:, :-half]) / half  # [rows, W - half + 1, 3], from that column on
    steps = np.zeros(image.shape[1], np.float32)
    steps[half:-half] = np.abs(means[:, half:-1] - means[:, : -half - 1]).mean(axis=(0, 2))
    return steps


def wrap_ratio(image: np.ndarray) -> float:
    """Step from the last column to the first over the mean step between neighbours; 1 is a closed panorama."""
    across = np.abs(image[:, 0].astype(np.float32) - image[:, -1]).mean()
    return float(across / column_steps(image).mean())


def closure(images: Sequence[np.ndarray], period: int) -> float:
    """Step from the last column to the first over that at every other `period`-th column, over all pictures together.

    With the views' stride in pixels, borders of views are compared with borders of views: on a closed loop all are
    alike, and the ratio is 1 up to chance.
    """
    around = [np.abs(image.astype(np.float32) - np.roll(image, 1, axis=1)).mean(axis=(0, 2)) for image in images]
    return float(np.mean([steps[0] for steps in around]) / np.mean([steps[period::period] for steps in around]))


def score(image: np.ndarray, named: Mapping[str, str], shift: int, last_shift: int) -> dict[str, object]:
    """Every score of one picture; `named` is what the caption says.

    Views' borders lie every `shift` pixels, those of the last step's views at `last_shift` and each view's size on.
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
