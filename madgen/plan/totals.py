"""Sums over a table of prompts, kept while it is built, so that nothing has to walk through it again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass
class Totals:
    """Of all prompts, in the order in which sizes first appear."""

    sizes: Counter[Size] = field(default_factory=Counter)
    """How many prompts there are of each size."""
    texts: Counter[Size] = field(default_factory=Counter)
    """As `sizes`, each prompt counted once for itself and once for each of its regions."""
    first_rows: dict[Size, int] = field(default_factory=dict)
    """The first prompt of each size that has the job's own regions."""
    lengths: Counter[int] = field(default_factory=Counter)
    """How many prompts there are of each length: UTF-8 bytes of the text, or of all else that a line says."""
    negative: str = ""
    """A negative prompt that is not empty, if there is any."""

    def add(self, size: Size, count: int, regions: int, negatives: tuple[str, ...], shared_row: int | None) -> None:
        """`count` prompts of one size and number of regions; `shared_row`: the first, if these are the job's."""
        self.sizes[size] += count
        self.texts[size] += (1 + regions) * count
        self.negative = self.negative or next(filter(None, negatives), "")
        if shared_row is not None:
            self.first_rows.setdefault(size, shared_row)

    def longer_than(self, size: int) -> int:
        """How many prompts are longer than `size` bytes, as `PromptTable.rows_longer_than` finds them."""
        return sum(count for length, count in self.lengths.items() if length > size)

    def to_json(self) -> dict[str, Any]:
        """For the header of a saved table."""
        rows = [[*size, count, self.texts[size], self.first_rows.get(size)] for size, count in self.sizes.items()]
        return {"sizes": rows, "lengths": sorted(self.lengths.items()), "negative": self.negative}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Totals:
        """The inverse of `to_json`."""
        made = cls(negative=content["negative"], lengths=Counter(dict(content["lengths"])))
        for height, width, count, texts, first in content["sizes"]:
            made.sizes[height, width], made.texts[height, width] = count, texts
            if first is not None:
                made.first_rows[height, width] = first
        return made
