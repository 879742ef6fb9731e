"""Apply a safety checker to crops of a panorama; flagged crops are kept, blurred, or the panorama is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from madgen.config.schema import SafetyConfig
from madgen.images.crops import covering_squares
from madgen.models import safety_checker as _safety
from madgen.sampling.sampler import PanoramaSampler

BLUR = 8
"""Shorter side of a crop divided by the blur radius."""


@dataclass(frozen=True)
class Checked:
    """Result for one panorama."""

    image_HWC: np.ndarray
    """uint8 [H, W, 3]; with `action="blur"`, flagged crops are blurred."""
    flagged: list[list[int]]
    """Flagged crops, [left, top, right, bottom] in pixels."""
    crops: int
    """Number of crops that were checked."""
    action: str

    @property
    def dropped(self) -> bool:
        return bool(self.flagged) and self.action == "drop"

    @property
    def summary(self) -> str:
        return f"the safety checker flagged {len(self.flagged)} of {self.crops} crops"

    @property
    def changes(self) -> dict[str, Any]:
        """Entries for the sample's JSON."""
        return {"safety": {"flagged": self.flagged, "action": self.action}}


class Safety:
    """Check panoramas as `safety` of a job asks for; `size` is the side of a crop in pixels."""

    def __init__(self, checker: _safety.SafetyChecker, action: str, size: int):
        self.checker, self.action, self.size = checker, action, size

    @classmethod
    def load(cls, config: SafetyConfig, sampler: PanoramaSampler) -> Safety | None:
        """Load the checker; None if the job has none. Raises UserError if it cannot be loaded."""
        if config.checker is None:
            return None
        size = sampler.geometry.view_size * sampler.backbone.spec.factor
        return cls(_safety.load(config.checker, sampler.backbone.device), config.action, size)

    def __call__(self, image_HWC: np.ndarray) -> Checked:
        height, width = image_HWC.shape[:2]
        boxes = covering_squares(height, width, self.size)
        flagged = [box for box in boxes if self.checker.flags(image_HWC[box[1] : box[3], box[0] : box[2]])]
        image_HWC = blurred(image_HWC, flagged) if self.action == "blur" and flagged else image_HWC
        return Checked(image_HWC, flagged, len(boxes), self.action)


def blurred(image_HWC: np.ndarray, boxes: list[list[int]]) -> np.ndarray:
    """Return a copy in which only light and colour of the boxes are recognizable."""
    original, changed = Image.fromarray(image_HWC), Image.fromarray(image_HWC)
    for left, top, right, bottom in boxes:
        blur = ImageFilter.GaussianBlur(max(1, min(right - left, bottom - top) // BLUR))
        changed.paste(original.crop((left, top, right, bottom)).filter(blur), (left, top))
    return np.asarray(changed)
