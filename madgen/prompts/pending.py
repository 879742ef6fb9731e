"""Rows that are read and not in a batch yet."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from madgen.prompts.rows import Defaults, encode
from madgen.types import Prompt


class Pending:
    """Rows that are not in a batch yet."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.own: list[Prompt | None] = []  # None: nothing but the defaults
        self.places: list[int] = []
        self.bytes = 0

    def keep(self, kept: Sequence[int]) -> None:
        """Only the rows at these positions."""
        if len(kept) < len(self.ids):
            for name in ("ids", "texts", "own", "places"):
                values = getattr(self, name)
                setattr(self, name, [values[position] for position in kept])

    def own_columns(self, defaults: Defaults) -> tuple[pa.Array, pa.Array]:
        """What the rows say otherwise than `defaults`: the columns `own` and `regions` of a table."""
        if not any(self.own):
            return (pa.nulls(len(self.ids), pa.string()),) * 2
        pairs = [(None, None) if prompt is None else encode(prompt, defaults) for prompt in self.own]
        own, regions = zip(*pairs, strict=True)
        return pa.array(own, pa.string()), pa.array(regions, pa.string())
