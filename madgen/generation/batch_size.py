"""How many panoramas of a size are sampled together."""

from __future__ import annotations

import math

from madgen.config.schema import AUTO_BATCH, SamplingConfig
from madgen.prompts.totals import paths
from madgen.sampling.geometry import Geometry
from madgen.types import Prompt

BUSY_CELLS = {"cuda": 2 * 32 * 64**2}
"""Latent cells in one UNet pass that keep a device busy; of other devices one panorama does.

Measured with Stable Diffusion 2's shape on one H200: with more than 32 views of 64 x 64 cells, each with and without
guidance, the time of a view hardly falls (`growth` and `batch` in benchmarks/results/speed.md).
"""
MOST = 64
"""Panoramas at once, however small they are."""


class BatchSizes:
    """`sampling.batch_size` for each prompt; with `auto` as many panoramas as keep the device busy.

    It follows from the job and the kind of device, not from what fits: a resumed shard runs the same batches. Where
    memory runs out, they are sampled in smaller groups, see `engine.ladder`.
    """

    def __init__(self, sampling: SamplingConfig, geometry: Geometry, device_type: str):
        self.sampling, self.geometry = sampling, geometry
        self.busy = BUSY_CELLS.get(device_type, 0)

    def __call__(self, prompt: Prompt) -> int:
        asked = self.sampling.batch_size
        if asked != AUTO_BATCH:
            return int(asked)
        return min(MOST, max(1, math.ceil(self.busy / self._cells(prompt))))

    def _cells(self, prompt: Prompt) -> int:
        """Of one panorama in its largest UNet pass: of all views, of each prompt on it and of their negative ones."""
        layout = self.geometry.build(prompt.height, prompt.width, self.sampling.loop)
        steps = (0, self.geometry.overlap_from or 0)  # from there on there may be more views
        most = max(views.count * views.rows.size * views.columns.size for views in map(layout.at, steps))
        guided = self.sampling.guidance_scale > 1 and not self.geometry.spec.guidance_embedded
        texts, _, negatives = paths(prompt.negative, prompt.regions)
        return most * (texts + guided * negatives)
