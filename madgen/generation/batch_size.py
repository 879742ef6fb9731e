"""Choose the batch size from the job, and split batches when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from madgen.config.schema import AUTO_BATCH, SamplingConfig
from madgen.prompts.totals import paths
from madgen.sampling.geometry import Geometry
from madgen.types import Prompt

T = TypeVar("T")

BUSY_CELLS = {"cuda": 2 * 32 * 64**2}
"""Latent cells in one UNet pass that keep a device busy; one panorama is enough for other devices.

Measured with Stable Diffusion 2's shape on one H200: with more than 32 views of 64 x 64 cells, each with and without
guidance, the time per view hardly falls (`growth` and `batch` in benchmarks/results/speed.md).
"""
MAX_BATCH = 64
"""Maximum number of panoramas in a batch."""
VIEW_CHUNKS = (4, 1)
"""Numbers of views per pass to try when a single panorama does not fit into memory."""


class BatchSizes:
    """`sampling.batch_size` for each prompt; with `auto` as many panoramas as keep the device busy.

    The batch size follows from the job and the kind of device, not from the free memory, so that a resumed shard runs
    the same batches. If memory runs out, batches are split, see `BatchSplit`.
    """

    def __init__(self, sampling: SamplingConfig, geometry: Geometry, device_type: str):
        self.sampling, self.geometry = sampling, geometry
        self.busy = BUSY_CELLS.get(device_type, 0)

    def __call__(self, prompt: Prompt) -> int:
        size = self.sampling.batch_size
        if size != AUTO_BATCH:
            return int(size)
        return min(MAX_BATCH, max(1, math.ceil(self.busy / self._cells(prompt))))

    def _cells(self, prompt: Prompt) -> int:
        """Return the latent cells of a panorama's largest UNet pass: all views of all prompts and negatives."""
        layout = self.geometry.build(prompt.height, prompt.width, self.sampling.loop)
        steps = (0, self.geometry.overlap_from or 0)  # overlapping views are more than shifted ones
        cells = max(views.count * views.rows.size * views.columns.size for views in map(layout.at, steps))
        guided = self.geometry.spec.is_guided(self.sampling.guidance_scale)
        texts, _, negatives = paths(prompt.negative, prompt.regions)
        return cells * (texts + guided * negatives)


@dataclass(frozen=True)
class BatchSplit:
    """Split a batch, and the views of a UNet pass, to fit into memory."""

    panoramas: int
    """Panoramas at a time."""
    chunk_views: int | None = None
    """Views per UNet pass; None: all."""

    def __str__(self) -> str:
        panoramas = "one panorama" if self.panoramas == 1 else f"{self.panoramas} panoramas"
        if self.chunk_views is None:
            return f"{panoramas} at a time"
        views = "one view" if self.chunk_views == 1 else f"{self.chunk_views} views"
        return f"{panoramas} and {views} at a time (all views of a prompt where attention merges them)"

    def groups(self, items: Sequence[T]) -> list[Sequence[T]]:
        """Split items into the groups that are sampled together."""
        return [items[first : first + self.panoramas] for first in range(0, len(items), self.panoramas)]

    def smaller(self) -> Iterator[BatchSplit]:
        """Yield splits with less and less memory: fewer panoramas, which costs the least time, then fewer views."""
        split = self
        while split.panoramas > 1:
            split = replace(split, panoramas=-(-split.panoramas // 2))
            yield split
        for chunk in VIEW_CHUNKS:
            if split.chunk_views is None or chunk < split.chunk_views:
                yield BatchSplit(1, chunk)
