"""Scores of an image from its pixels alone: NumPy, no networks.

Images are uint8 [H, W, 3]. All sums are over integers, so that scores are equal on every machine. Steps and distances
are in levels (0..255), averaged over channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

VERSION = 1
"""Increase it when the definition of a score changes; all scores of a dataset are of one version."""
DIGITS = 4
NEAR = (-2, -1, 1, 2)
"""Offsets, in latent cells, of the steps that a border is compared with."""
BANDS = 8
"""Bands of a crop in `coherence`."""
HALF = 32
"""Distance between crops, in levels, at which `coherence` is 0.5."""


def pixel_scores(
    names: Iterable[str], image_HWC: np.ndarray, rows: Sequence[int], columns: Sequence[int], cell: int
) -> dict[str, float]:
    """Compute scores by name, rounded, without those that are undefined; `rows`, `columns`, `cell`: see `seam`."""
    known = {
        "seam": lambda: seam(image_HWC, rows, columns, cell),
        "wrap": lambda: wrap(image_HWC, cell),
        "coherence": lambda: coherence(image_HWC),
    }
    values = {name: known[name]() for name in names}
    return {name: round(value, DIGITS) for name, value in values.items() if value is not None}


def seam(image_HWC: np.ndarray, rows: Sequence[int], columns: Sequence[int], cell: int) -> float | None:
    """Return the ratio of steps at borders of views to steps beside them: 1 is seamless, 2 about twice the step.

    `(1 + step at borders) / (1 + step at cell borders one and two cells beside them)`, averaged over all borders of a
    direction; the larger value of both directions. The 1 is one level, an invisible step, and defines the score of
    uniform images. None if there is no border, or nothing beside one.

    `rows`, `columns`: borders in pixels, the first row or column after each. `cell`: pixels per latent cell; borders
    are multiples of it. A step is the difference between means of adjacent half cells, in bands one cell high, since
    the decoder spreads a seam over some pixels, and texture is not a seam.
    """
    ratios = [_ratio(image_HWC, columns, cell), _ratio(image_HWC.swapaxes(0, 1), rows, cell)]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def wrap(image_HWC: np.ndarray, cell: int) -> float | None:
    """Return `seam` of the border where the right edge of a looped panorama meets the left one.

    It is a single border, so content affects it too: expect 0.6 to 2 for closed loops.
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
    """Return the step at the left border of each column of cells [W // cell]; 0 at the first one."""
    half = max(1, cell // 2)
    height, width = (extent // cell for extent in image_HWC.shape[:2])
    bands = image_HWC[: height * cell, : width * cell].reshape(height, cell, -1).sum(axis=1, dtype=np.int64)
    halves = bands.reshape(height, -1, half, 3).sum(axis=2)
    steps = np.abs(np.diff(halves, axis=1)).sum(axis=(0, 2)) / (height * 3 * cell * half)
    return np.concatenate([[0.0], steps[cell // half - 1 :: cell // half]])


def coherence(image_HWC: np.ndarray) -> float | None:
    """Return the similarity of square crops, 0..1: `1 / (1 + d / 32)` with `d` the distance of their colours.

    At least two crops lie side by side along the longer side, as large as the shorter side allows. Each is split
    lengthwise into 8 bands, so that sky is compared with sky and ground with ground. `d` is the Wasserstein distance
    of histograms, in levels, averaged over pairs of crops, bands and channels: only the amount of each color in a band
    counts, not its position. None for images that are too small.
    """
    wide_HWC = image_HWC if image_HWC.shape[1] >= image_HWC.shape[0] else image_HWC.swapaxes(0, 1)
    height, width = wide_HWC.shape[:2]
    side = min(height, width // 2)
    if side < BANDS:
        return None
    count, top = width // side, (height - side) // 2
    lefts = [number * (width - side) // (count - 1) for number in range(count)]
    edges = [top + number * side // BANDS for number in range(BANDS + 1)]
    distances = [
        _distance([wide_HWC[first:last, left : left + side] for left in lefts]) for first, last in pairwise(edges)
    ]
    return float(1 / (1 + sum(distances) / BANDS / HALF))


def _distance(parts: Sequence[np.ndarray]) -> float:
    """Return the mean Wasserstein distance over all pairs of equally large images, in levels."""
    channels = 256 * np.arange(3)
    counts = np.stack([np.bincount((part + channels).ravel(), minlength=768) for part in parts])
    cumulated = np.sort(np.cumsum(counts.reshape(-1, 3, 256), axis=2), axis=0)
    # Sum of |a - b| over pairs of sorted values: the i-th is the larger one i times, the smaller one n - 1 - i times.
    weights = 2 * np.arange(len(parts)) - (len(parts) - 1)
    total = int(np.tensordot(weights, cumulated.sum(axis=(1, 2)), axes=1))
    pairs = len(parts) * (len(parts) - 1) // 2
    return total / pairs / parts[0].size
