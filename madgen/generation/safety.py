"""A safety checker over a panorama: it looks at crops of a view's size; what it flags is kept, blurred or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from madgen.config.schema import SafetyConfig
from madgen.models import safety_checker as _safety
from madgen.sampling.sampler import PanoramaSampler

BLUR = 8
"""The blur's radius is this part of a crop's shorter side."""


@dataclass(frozen=True)
class Checked:
    """A panorama that was looked at."""

    image_HWC: np.ndarray
    """As it may be shown, unless it is dropped: `blur` changes flagged crops."""
    flagged: list[list[int]]
    """[left, top, right, bottom] in pixels."""
    crops: int
    """How many were looked at."""
    action: str

    @property
    def dropped(self) -> bool:
        return bool(self.flagged) and self.action == "drop"

    @property
    def said(self) -> str:
        """In words."""
        return f"the safety checker flagged {len(self.flagged)} of {self.crops} crops"

    @property
    def changes(self) -> dict[str, Any]:
        """What is recorded with the sample."""
        return {"safety": {"flagged": self.flagged, "action": self.action}}


class Safety:
    """`safety` of a job, at work: `size` is a crop's side in pixels."""

    def __init__(self, checker: _safety.SafetyChecker, action: str, size: int):
        self.checker, self.action, self.size = checker, action, size

    @classmethod
    def load(cls, config: SafetyConfig, sampler: PanoramaSampler) -> Safety | None:
        """None where no checker is asked for; UserError if it cannot be loaded."""
        if config.checker is None:
            return None
        size = sampler.geometry.view_size * sampler.backbone.spec.factor
        return cls(_safety.load(config.checker, sampler.backbone.device), config.action, size)

    def __call__(self, image_HWC: np.ndarray) -> Checked:
        height, width = image_HWC.shape[:2]
        boxes = crops(height, width, self.size)
        flagged = [box for box in boxes if self.checker.flags(image_HWC[box[1] : box[3], box[0] : box[2]])]
        image_HWC = blurred(image_HWC, flagged) if self.action == "blur" and flagged else image_HWC
        return Checked(image_HWC, flagged, len(boxes), self.action)


def crops(height: int, width: int, size: int) -> list[list[int]]:
    """Squares [left, top, right, bottom] side by side that cover a picture; the last of a row or column ends with it.

    >>> crops(4, 10, 4)
    [[0, 0, 4, 4], [4, 0, 8, 4], [6, 0, 10, 4]]
    """
    down, across = min(size, height), min(size, width)
    return [[left, top, left + across, top + down] for top in _starts(height, down) for left in _starts(width, across)]


def _starts(extent: int, size: int) -> list[int]:
    return [min(start, extent - size) for start in range(0, extent, size)]


def blurred(image_HWC: np.ndarray, boxes: list[list[int]]) -> np.ndarray:
    """A copy in which the boxes show light and colour, but no shapes."""
    original, changed = Image.fromarray(image_HWC), Image.fromarray(image_HWC)
    for left, top, right, bottom in boxes:
        blur = ImageFilter.GaussianBlur(max(1, min(right - left, bottom - top) // BLUR))
        changed.paste(original.crop((left, top, right, bottom)).filter(blur), (left, top))
    return np.asarray(changed)
