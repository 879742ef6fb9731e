"""What the networks see of a picture: squares of a view's size, in places that depend on its key alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from madgen.utils.errors import UserError
from madgen.utils.seeding import derived_seed

TRIES = "one random square a picture, at blake2b of seed/key"
TILES = "all squares side by side from the top left corner"


@dataclass(frozen=True)
class Crops:
    """How pictures are cut."""

    side: int
    """Pixels."""
    seed: int = 0

    def describe(self, kind: str) -> dict[str, Any]:
        """The protocol of `random` or `all` crops."""
        chosen = {"choice": TRIES, "seed": self.seed} if kind == "random" else {"choice": TILES}
        return {"side_px": self.side, **chosen}

    def random(self, key: str, height: int, width: int) -> tuple[int, int]:
        """Top and left of the one random square of a picture; UserError if it has none."""
        if min(height, width) < self.side:
            raise UserError(f"sample {key} is {height}x{width} px, too small for crops of {self.side} px (--crop)")
        number = derived_seed(self.seed, key)
        return number % (height - self.side + 1), (number >> 24) % (width - self.side + 1)

    def tiles(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of the squares that do not overlap; what is left over right and below is not seen."""
        tops, lefts = (range(0, extent - self.side + 1, self.side) for extent in (height, width))
        return [(top, left) for top in tops for left in lefts]


@dataclass(frozen=True)
class Picture:
    """One sample, cut."""

    key: str
    prompt: str
    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    crops: Crops

    @cached_property
    def crop(self) -> np.ndarray:
        """uint8 [side, side, 3], the random one."""
        return self._cut(*self.crops.random(self.key, *self.image_HWC.shape[:2]))

    @cached_property
    def tiles(self) -> list[np.ndarray]:
        """uint8 [side, side, 3] each."""
        return [self._cut(*corner) for corner in self.crops.tiles(*self.image_HWC.shape[:2])]

    def _cut(self, top: int, left: int) -> np.ndarray:
        return self.image_HWC[top : top + self.crops.side, left : left + self.crops.side]


def to_pixels(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """float32 [N, 3, h, w] in 0..1."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255


def mean_over_pairs(values_NN: Tensor) -> float:
    """The mean above the diagonal of a symmetric matrix; NaN if there is nothing."""
    count = len(values_NN)
    return float(values_NN.triu(1).sum()) / (count * (count - 1) / 2) if count > 1 else math.nan
