"""Counts over a prompt table, updated while it is built, so that planning need not iterate over all prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from madgen.images.placement import Size
from madgen.types import Region


@dataclass
class SizeTotals:
    """Counts over the prompts of one size."""

    prompts: int = 0
    texts: int = 0
    """Number of prompts, including those of regions."""
    negatives: int = 0
    """Number of negative prompts, distinct ones of each row and its regions."""
    negatives_apart: int = 0
    """Same as `negatives`, but each bootstrapped region counts by itself."""
    first_row: int | None = None
    """First row that has the job's own regions."""


@dataclass
class PromptTotals:
    """Counts over a table."""

    sizes: dict[Size, SizeTotals] = field(default_factory=dict)
    """In the order in which sizes first appear."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of prompts by length in UTF-8 bytes, see `madgen.prompts.table.text_sizes`."""
    negative: str = ""
    """A non-empty negative prompt, if there is any."""

    def add(
        self, size: Size, count: int, negative: str, regions: Sequence[Region], shared_row: int | None = None
    ) -> None:
        """Add `count` equal prompts; `shared_row`: the first row, if the regions are the job's."""
        texts, negatives, apart = paths(negative, regions)
        totals = self.sizes.setdefault(size, SizeTotals())
        totals.prompts += count
        totals.texts += texts * count
        totals.negatives += negatives * count
        totals.negatives_apart += apart * count
        self.negative = self.negative or next(filter(None, (negative, *(region.negative for region in regions))), "")
        if totals.first_row is None:
            totals.first_row = shared_row

    def longer_than(self, size: int) -> int:
        """Return the number of rows in `PromptTable.rows_longer_than(size)`."""
        return sum(count for length, count in self.lengths.items() if length > size)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a saved table's header."""
        rows = [[*size, *astuple(totals)] for size, totals in self.sizes.items()]
        return {"sizes": rows, "lengths": sorted(self.lengths.items()), "negative": self.negative}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PromptTotals:
        """Invert `to_json`."""
        sizes = {(height, width): SizeTotals(*counts) for height, width, *counts in content["sizes"]}
        return cls(sizes, Counter(dict(content["lengths"])), content["negative"])


def paths(negative: str, regions: Sequence[Region]) -> tuple[int, int, int]:
    """Return the numbers of prompts and of distinct negative prompts of a row and its regions, and the latter in steps
    with bootstrapping, in which each region with a mask is denoised over its own views."""
    cut_out = sum(region.is_cut_out for region in regions)
    others = {negative, *(region.negative for region in regions if not region.is_cut_out)}
    return 1 + len(regions), len({negative, *(region.negative for region in regions)}), cut_out + len(others)
