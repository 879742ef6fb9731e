"""Compute the scores of a job: of pixels in the writing thread, of CLIP on the device."""

from __future__ import annotations

from functools import cache

import numpy as np

from madgen.images.crops import covering_squares
from madgen.images.scores import DIGITS, pixel_scores
from madgen.models.clip import Clip
from madgen.planning.resolved_run import ResolvedRun
from madgen.planning.shapes import Shapes


class PixelScores:
    """Compute the scores of a job's panoramas that depend on pixels and views alone: `scores(image_HWC)`."""

    def __init__(self, run: ResolvedRun):
        shapes, loop = Shapes(run), run.job.sampling.loop
        geometry, last = shapes.geometry, max(shapes.steps, default=0)
        self.names, self.cell = run.job.pixel_scores, geometry.spec.factor
        # the last step smooths the borders of earlier ones
        self._last_views = cache(lambda height, width: geometry.build(height, width, loop).at(last))

    def __call__(self, image_HWC: np.ndarray) -> dict[str, float]:
        """Return rounded scores, without those that are undefined for this image."""
        views = self._last_views(*image_HWC.shape[:2])
        rows, columns = ([self.cell * border for border in axis.borders] for axis in (views.rows, views.columns))
        return pixel_scores(self.names, image_HWC, rows, columns, self.cell)


def clip_score(clip: Clip, image_HWC: np.ndarray, text: str) -> float:
    """Return max(0, 100 · cosine) of a panorama and a text, averaged over squares that cover the panorama."""
    height, width = image_HWC.shape[:2]
    boxes = covering_squares(height, width, min(height, width))
    cosines = [clip.similarity(image_HWC[top:bottom, left:right], text) for left, top, right, bottom in boxes]
    return round(sum(max(0.0, 100 * cosine) for cosine in cosines) / len(cosines), DIGITS)
