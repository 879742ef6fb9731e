"""Sums over a table of prompts, kept while it is built, so that nothing has to walk through it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from madgen.types import Region

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass
class Totals:
    """Of all prompts, in the order in which sizes first appear."""

    sizes: Counter[Size] = field(default_factory=Counter)
    """How many prompts there are of each size."""
    texts: Counter[Size] = field(default_factory=Counter)
    """As `sizes`, each prompt counted once for itself and once for each of its regions."""
    negatives: Counter[Size] = field(default_factory=Counter)
    """As `texts`, negative prompts: one that a prompt and its regions have in common counts once."""
    negatives_apart: Counter[Size] = field(default_factory=Counter)
    """As `negatives`, while regions are bootstrapped."""
    first_rows: dict[Size, int] = field(default_factory=dict)
    """The first prompt of each size that has the job's own regions."""
    lengths: Counter[int] = field(default_factory=Counter)
    """How many prompts there are of each length: UTF-8 bytes of the text, or of all else that a line says."""
    negative: str = ""
    """A negative prompt that is not empty, if there is any."""

    def add(
        self, size: Size, count: int, negative: str, regions: Sequence[Region], shared_row: int | None = None
    ) -> None:
        """`count` prompts that are alike in all this; `shared_row`: the first, if the regions are the job's."""
        texts, negatives, apart = paths(negative, regions)
        self.sizes[size] += count
        self.texts[size] += texts * count
        self.negatives[size] += negatives * count
        self.negatives_apart[size] += apart * count
        self.negative = self.negative or next(filter(None, (negative, *(region.negative for region in regions))), "")
        if shared_row is not None:
            self.first_rows.setdefault(size, shared_row)

    def longer_than(self, size: int) -> int:
        """How many prompts are longer than `size` bytes, as `PromptTable.rows_longer_than` finds them."""
        return sum(count for length, count in self.lengths.items() if length > size)

    def to_json(self) -> dict[str, Any]:
        """For the header of a saved table."""
        counts = self.sizes, self.texts, self.negatives, self.negatives_apart
        rows = [[*size, *(of[size] for of in counts), self.first_rows.get(size)] for size in self.sizes]
        return {"sizes": rows, "lengths": sorted(self.lengths.items()), "negative": self.negative}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Totals:
        """The inverse of `to_json`."""
        made = cls(negative=content["negative"], lengths=Counter(dict(content["lengths"])))
        for height, width, count, texts, negatives, apart, first in content["sizes"]:
            size = height, width
            made.sizes[size], made.texts[size] = count, texts
            made.negatives[size], made.negatives_apart[size] = negatives, apart
            if first is not None:
                made.first_rows[size] = first
        return made


def paths(negative: str, regions: Sequence[Region]) -> tuple[int, int, int]:
    """Of a prompt with its regions: texts, and negative prompts, one for those that see the same views; first where all
    do, then where regions that are cut out are bootstrapped and see their own."""
    cut_out = sum(region.is_cut_out for region in regions)
    others = {negative, *(region.negative for region in regions if not region.is_cut_out)}
    return 1 + len(regions), len({negative, *(region.negative for region in regions)}), cut_out + len(others)
