"""What pairs of crops of one picture are compared with: random pairs of different pictures of a prompt.

The paper has intra-LPIPS and intra-Style of plain Stable Diffusion so, over 1000 pairs a prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry
from madgen.evaluation.partial_results import Column, digest, prompt_of
from madgen.evaluation.runner import Bar, same_numbers
from madgen.metrics.crops import Crops, Picture
from madgen.utils.atomic import atomic
from madgen.utils.seeding import derived_seed


@dataclass(frozen=True)
class Pair:
    """Random crops of two pictures, in place of the crops of one."""

    prompt: str
    tiles: list[np.ndarray]


def draw(keys: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """`count` different pairs, or all that there are; they depend on the keys and the seed alone."""
    keys = sorted(keys)
    possible = len(keys) * (len(keys) - 1) // 2
    chosen = random.Random(derived_seed(seed, "/".join(keys))).sample(range(possible), min(count, possible))
    found = []
    for number in sorted(chosen):  # pairs count as (0, 1), (0, 2), (1, 2), (0, 3), ...
        second = (1 + isqrt(1 + 8 * number)) // 2
        found.append((keys[number - second * (second - 1) // 2], keys[second]))
    return found


def score_pairs(
    directory: DatasetDir, module: Any, network: Any, column: Column, folder: Path, crops: Crops, count: int
) -> dict[str, float]:
    """For each prompt the mean of a metric over pairs; kept under `folder` for the next time."""
    entries = {e["key"]: (sidecar["shard"], e) for sidecar in directory.sidecars() for e in sidecar["samples"]}
    prompts: dict[str, list[str]] = {}
    for key in sorted(entries, key=lambda key: (prompt_of(key), key)):
        prompts.setdefault(prompt_of(key), []).append(key)
    pairs = {prompt: draw(keys, count, crops.seed) for prompt, keys in prompts.items()}
    bar, found = Bar(f"pairs of {directory.root}", sum(map(len, pairs.values()))), {}
    try:
        for prompt, drawn in pairs.items():
            content = digest([crops.seed, [[entries[key][1]["sha256"] for key in pair] for pair in drawn]])
            path = folder / column.id / f"pairs-{content}.npy"
            if not path.exists():
                with same_numbers():
                    found_in = [[entries[key] for key in pair] for pair in drawn]
                    values = [_score(directory, module, network, crops, both) for both in found_in]
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic(path) as stream:
                    np.save(stream, np.array(values))
            bar.advance(len(drawn))
            values_of = np.load(path)
            found[prompt] = float(values_of.mean()) if values_of.size else math.nan
    finally:
        bar.stop()
    return found


def _score(directory: DatasetDir, module: Any, network: Any, crops: Crops, both: Sequence[tuple[str, Any]]) -> float:
    tiles = []
    for shard, entry in both:
        image = read_entry(directory, shard, entry).image_HWC
        tiles.append(Picture(entry["key"], "", image, crops).crop)
    return module.score([Pair("", tiles)], network)[0]
