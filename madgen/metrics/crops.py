"""Square crops, the size of a view, that metrics pass to their networks. Positions depend on the sample's key alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from madgen.utils.errors import UserError
from madgen.utils.seeding import derived_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Crops:
    """Crop size and seed."""

    side: int
    """Pixels."""
    seed: int = 0

    def describe(self, kind: str) -> dict[str, Any]:
        """Return the protocol of `random` or `all` crops."""
        if kind == "random":
            return {"side_px": self.side, "choice": "one random square a picture, at blake2b of seed/key",
                    "seed": self.seed}  # fmt: skip
        return {"side_px": self.side, "choice": "all squares side by side from the top left corner"}

    def random(self, key: str, height: int, width: int) -> tuple[int, int]:
        """Return top and left of an image's random crop; raise UserError if the image is too small."""
        if min(height, width) < self.side:
            raise UserError(f"sample {key} is {height}x{width} px, too small for crops of {self.side} px (--crop)")
        number = derived_seed(self.seed, key)
        return number % (height - self.side + 1), (number >> 24) % (width - self.side + 1)

    def tiles(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return top and left of all non-overlapping crops; a remainder at the right and bottom is ignored."""
        tops, lefts = (range(0, extent - self.side + 1, self.side) for extent in (height, width))
        return [(top, left) for top in tops for left in lefts]


@dataclass(frozen=True)
class CroppedImage:
    """One sample and its crops."""

    key: str
    prompt: str
    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    crops: Crops

    @cached_property
    def crop(self) -> np.ndarray:
        """The random crop, uint8 [side, side, 3]."""
        return self._cut(*self.crops.random(self.key, *self.image_HWC.shape[:2]))

    @cached_property
    def tiles(self) -> list[np.ndarray]:
        """All non-overlapping crops, uint8 [side, side, 3] each."""
        return [self._cut(*corner) for corner in self.crops.tiles(*self.image_HWC.shape[:2])]

    def _cut(self, top: int, left: int) -> np.ndarray:
        return self.image_HWC[top : top + self.crops.side, left : left + self.crops.side]


def to_pixels(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Convert uint8 images to float32 [N, 3, h, w] in 0..1."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255


def compare_pairs(items: Sequence[T], compare: Callable[[T, T], float]) -> Tensor:
    """Compare all pairs of different items, float64 [N, N], of which the part above the diagonal is filled."""
    values_NN = torch.zeros(len(items), len(items), dtype=torch.float64)
    for (row, one), (column, other) in combinations(enumerate(items), 2):
        values_NN[row, column] = compare(one, other)
    return values_NN


def mean_over_pairs(values_NN: Tensor) -> float:
    """Average the entries above the diagonal; NaN if there are none."""
    count = len(values_NN)
    return float(values_NN.triu(1).sum()) / (count * (count - 1) / 2) if count > 1 else math.nan
