"""Score random pairs of different images of a prompt, as a baseline for metrics over pairs of crops of one image.

The paper reports intra-LPIPS and intra-Style of plain Stable Diffusion this way, over 1000 pairs per prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.format import prompt_id
from madgen.dataset.layout import DatasetDir
from madgen.evaluation.metric_columns import counting, exact_float32, read_image
from madgen.evaluation.partial_results import Column, digest, save_array
from madgen.metrics.crops import Crops
from madgen.utils.seeding import derived_seed


@dataclass(frozen=True)
class ImagePair:
    """Random crops of two images, in place of the crops of one."""

    tiles: list[np.ndarray]


def draw_pairs(keys: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Draw `count` different pairs, or all if there are fewer; they depend on the keys and the seed alone."""
    keys = sorted(keys)
    possible = len(keys) * (len(keys) - 1) // 2
    numbers = random.Random(derived_seed(seed, "/".join(keys))).sample(range(possible), min(count, possible))
    pairs = []
    for number in sorted(numbers):  # pairs are numbered (0, 1), (0, 2), (1, 2), (0, 3), ...
        second = (1 + isqrt(1 + 8 * number)) // 2
        pairs.append((keys[number - second * (second - 1) // 2], keys[second]))
    return pairs


def score_pairs(
    directory: DatasetDir, module: Any, network: Any, column: Column, folder: Path, crops: Crops, count: int
) -> dict[str, float]:
    """Return each prompt's mean of a metric over pairs; the values are cached in `folder`."""
    entries = {entry.key: entry for entry in directory.entries()}
    keys = sorted(entries, key=lambda key: (prompt_id(key), key))
    pairs = {prompt: draw_pairs(list(own), count, crops.seed) for prompt, own in groupby(keys, prompt_id)}

    def score(pair: tuple[str, str]) -> float:
        tiles = [read_image(directory, entries[key], crops).crop for key in pair]
        return module.score([ImagePair(tiles)], network)[0]

    means = {}
    with counting(f"pairs of {directory.root}", sum(map(len, pairs.values()))) as advance, exact_float32():
        for prompt, drawn in pairs.items():
            content = digest([crops.seed, [[entries[key].sha256 for key in pair] for pair in drawn]])
            path = folder / column.id / f"pairs-{content}.npy"
            if not path.exists():
                save_array(path, np.array([score(pair) for pair in drawn]))
            advance(len(drawn))
            values = np.load(path)
            means[prompt] = float(values.mean()) if values.size else math.nan
    return means
