"""Scores of one picture from its pixels alone: numpy, no weights.

Pictures are uint8 [H, W, 3]. What is summed is whole numbers, so the same pixels have the same score on every machine.
Steps and distances are levels of 255, means over the channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

VERSION = 1
"""Raise it when a score changes its meaning: a dataset holds scores of one version."""
DIGITS = 4
NEAR = (-2, -1, 1, 2)
"""Where the steps beside a border are looked at: so many latent cells away."""
BANDS = 8
HALF = 32
"""Levels that crops differ by where `coherence` is one half."""


def pixel_scores(
    names: Iterable[str], image_HWC: np.ndarray, rows: Sequence[int], columns: Sequence[int], cell: int
) -> dict[str, float]:
    """The scores of these names that the picture has, rounded; `rows`, `columns`, `cell` as in `seam`."""
    known = {
        "seam": lambda: seam(image_HWC, rows, columns, cell),
        "wrap": lambda: wrap(image_HWC, cell),
        "coherence": lambda: coherence(image_HWC),
    }
    found = {name: known[name]() for name in names}
    return {name: round(value, DIGITS) for name, value in found.items() if value is not None}


def seam(image_HWC: np.ndarray, rows: Sequence[int], columns: Sequence[int], cell: int) -> float | None:
    """The step across the views' borders over the steps beside them: 1 is seamless, 2 about twice the step.

    `(1 + step at the borders) / (1 + step at other cells' borders, one and two cells beside them)`, means over all
    borders of one direction; of the two directions the larger. The 1 is one level, below which nobody sees a step: so
    plain pictures have a score too. None if there is no border, or nothing beside one.

    `rows`, `columns`: the borders in pixels, the first row or column of the view that begins or after the one that
    ends. `cell`: pixels of a latent cell, at whose borders the views end. A step is that from the mean of half a cell
    to the next half, in bands of a cell: the decoder smears it over some pixels, and texture is not a seam.
    """
    ratios = [_ratio(image_HWC, columns, cell), _ratio(image_HWC.swapaxes(0, 1), rows, cell)]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def wrap(image_HWC: np.ndarray, cell: int) -> float | None:
    """As `seam`, of the one border where the right edge of a closed picture meets the left one.

    Being one border of one picture, it also tells of a tower that begins there: expect 0.6 to 2 of what is closed.
    """
    near = cell * min(1 + max(NEAR), image_HWC.shape[1] // (2 * cell))
    around = np.concatenate([image_HWC[:, -near:], image_HWC[:, :near]], axis=1) if near else image_HWC[:, :0]
    return _ratio(around, [near], cell)


def _ratio(image_HWC: np.ndarray, borders: Sequence[int], cell: int) -> float | None:
    last = image_HWC.shape[1] // cell - 1
    at = sorted({border // cell for border in borders if 0 < border // cell <= last})
    beside = sorted({place + by for place in at for by in NEAR if 0 < place + by <= last} - set(at))
    if not at or not beside:
        return None
    steps = _steps(image_HWC, cell)
    return float((1 + steps[at].mean()) / (1 + steps[beside].mean()))


def _steps(image_HWC: np.ndarray, cell: int) -> np.ndarray:
    """The step at the left border of each cell of a row of cells [W // cell]; none at the first one."""
    half = max(1, cell // 2)
    height, width = (extent // cell for extent in image_HWC.shape[:2])
    bands = image_HWC[: height * cell, : width * cell].reshape(height, cell, -1).sum(axis=1, dtype=np.int64)
    halves = bands.reshape(height, -1, half, 3).sum(axis=2)
    steps = np.abs(np.diff(halves, axis=1)).sum(axis=(0, 2)) / (height * 3 * cell * half)
    return np.concatenate([[0.0], steps[cell // half - 1 :: cell // half]])


def coherence(image_HWC: np.ndarray) -> float | None:
    """How alike square crops are, 0..1: `1 / (1 + d / 32)`, where `d` is how far their colours differ; 1 is uniform.

    The crops stand side by side along the longer side, as large as the shorter side lets them, two at least. Each is
    cut lengthwise into 8 bands (sky and ground are compared with their like). `d` is the mean, over pairs of crops,
    bands and channels, of the levels by which the values of one must move to become those of the other: the
    Wasserstein distance of their histograms. So where things stand within a band does not count, only how much of
    which colour there is. None for a picture that is too small for crops.
    """
    picture = image_HWC if image_HWC.shape[1] >= image_HWC.shape[0] else image_HWC.swapaxes(0, 1)
    height, width = picture.shape[:2]
    side = min(height, width // 2)
    if side < BANDS:
        return None
    count, top = width // side, (height - side) // 2
    lefts = [number * (width - side) // (count - 1) for number in range(count)]
    edges = [top + number * side // BANDS for number in range(BANDS + 1)]
    distances = [
        _distance([picture[first:last, left : left + side] for left in lefts]) for first, last in pairwise(edges)
    ]
    return float(1 / (1 + sum(distances) / BANDS / HALF))


def _distance(parts: Sequence[np.ndarray]) -> float:
    """Mean Wasserstein distance over all pairs of pictures of one size, in levels."""
    channels = 256 * np.arange(3)
    counts = np.stack([np.bincount((part + channels).ravel(), minlength=768) for part in parts])
    cumulated = np.sort(np.cumsum(counts.reshape(-1, 3, 256), axis=2), axis=0)
    # The sum of |a - b| over pairs, of sorted values: the i-th is the larger one i times, the smaller one n - 1 - i.
    weights = 2 * np.arange(len(parts)) - (len(parts) - 1)
    total = int(np.tensordot(weights, cumulated.sum(axis=(1, 2)), axes=1))
    pairs = len(parts) * (len(parts) - 1) // 2
    return total / pairs / parts[0].size
