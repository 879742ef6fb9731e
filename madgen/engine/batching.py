"""How many panoramas of a size are sampled together."""

from __future__ import annotations

import math

from madgen.geometry import Geometry
from madgen.schema import AUTO_BATCH
from madgen.types import Prompt

BUSY_VIEWS = {"cuda": 32}
"""Views in one UNet pass that keep a device busy: with more, the time of a view hardly falls (see `growth` in
benchmarks/results/speed.md). Of other devices one panorama does."""


class BatchSizes:
    """`sampling.batch_size` for each size; with `auto` as many panoramas as keep the device busy.

    It follows from the job and the kind of device, not from what fits: a resumed shard runs the same batches. Where
    memory runs out, they are sampled in smaller groups, see `engine.ladder`.
    """

    def __init__(self, asked: int | str, geometry: Geometry, loop: bool, device_type: str):
        self.asked, self.geometry, self.loop, self.device_type = asked, geometry, loop, device_type

    def __call__(self, prompt: Prompt) -> int:
        if self.asked != AUTO_BATCH:
            return int(self.asked)
        busy = BUSY_VIEWS.get(self.device_type, 0)
        return max(1, math.ceil(busy / self._views(prompt.height, prompt.width)))

    def _views(self, height: int, width: int) -> float:
        """Of one panorama in a step, in views of the size that the backbone was trained at."""
        spec = self.geometry.spec
        views = self.geometry.build(height, width, self.loop).at(0)
        return views.count * views.rows.size * views.columns.size / spec.view_size**2
