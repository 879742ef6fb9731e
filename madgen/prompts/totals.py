"""Counts over a prompt table, updated while it is built, so that planning need not iterate over all prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from madgen.images.placement import Size
from madgen.types import Region


@dataclass
class PromptTotals:
    """Counts by size, in the order in which sizes first appear."""

    sizes: Counter[Size] = field(default_factory=Counter)
    """Number of prompts."""
    texts: Counter[Size] = field(default_factory=Counter)
    """Number of prompts, including those of regions."""
    negatives: Counter[Size] = field(default_factory=Counter)
    """Number of negative prompts, distinct ones of each row and its regions."""
    negatives_apart: Counter[Size] = field(default_factory=Counter)
    """Same as `negatives`, but each bootstrapped region counts by itself."""
    first_rows: dict[Size, int] = field(default_factory=dict)
    """First row of each size that has the job's own regions."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of prompts by length in UTF-8 bytes, see `madgen.prompts.table.text_sizes`."""
    negative: str = ""
    """A non-empty negative prompt, if there is any."""

    def add(
        self, size: Size, count: int, negative: str, regions: Sequence[Region], shared_row: int | None = None
    ) -> None:
        """Add `count` equal prompts; `shared_row`: the first row, if the regions are the job's."""
        texts, negatives, apart = paths(negative, regions)
        self.sizes[size] += count
        self.texts[size] += texts * count
        self.negatives[size] += negatives * count
        self.negatives_apart[size] += apart * count
        self.negative = self.negative or next(filter(None, (negative, *(region.negative for region in regions))), "")
        if shared_row is not None:
            self.first_rows.setdefault(size, shared_row)

    def longer_than(self, size: int) -> int:
        """Return the number of rows in `PromptTable.rows_longer_than(size)`."""
        return sum(count for length, count in self.lengths.items() if length > size)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a saved table's header."""
        counts = self.sizes, self.texts, self.negatives, self.negatives_apart
        rows = [[*size, *(of[size] for of in counts), self.first_rows.get(size)] for size in self.sizes]
        return {"sizes": rows, "lengths": sorted(self.lengths.items()), "negative": self.negative}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PromptTotals:
        """Invert `to_json`."""
        totals = cls(negative=content["negative"], lengths=Counter(dict(content["lengths"])))
        for height, width, count, texts, negatives, apart, first in content["sizes"]:
            size = height, width
            totals.sizes[size], totals.texts[size] = count, texts
            totals.negatives[size], totals.negatives_apart[size] = negatives, apart
            if first is not None:
                totals.first_rows[size] = first
        return totals


def paths(negative: str, regions: Sequence[Region]) -> tuple[int, int, int]:
    """Return the numbers of prompts and of distinct negative prompts of a row and its regions, and the latter in steps
    with bootstrapping, in which each region with a mask is denoised over its own views."""
    cut_out = sum(region.is_cut_out for region in regions)
    others = {negative, *(region.negative for region in regions if not region.is_cut_out)}
    return 1 + len(regions), len({negative, *(region.negative for region in regions)}), cut_out + len(others)
