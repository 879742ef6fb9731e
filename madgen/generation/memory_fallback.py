"""How much is sampled at once, and how much less where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")
CHUNKS = (4, 1)


@dataclass(frozen=True)
class Rung:
    """So many panoramas at a time, of so many views a UNet pass; None: all of them."""

    panoramas: int
    chunk_views: int | None = None

    def __str__(self) -> str:
        panoramas = "one panorama" if self.panoramas == 1 else f"{self.panoramas} panoramas"
        if self.chunk_views is None:
            return f"{panoramas} at a time"
        views = "one view" if self.chunk_views == 1 else f"{self.chunk_views} views"
        return f"{panoramas} and {views} at a time, all of a prompt's where attention merges them"

    def groups(self, things: Sequence[T]) -> list[Sequence[T]]:
        """What is sampled together."""
        return [things[first : first + self.panoramas] for first in range(0, len(things), self.panoramas)]

    def below(self) -> Iterator[Rung]:
        """What takes less and less memory: half as many panoramas, as they are the fastest to part with, then views."""
        rung = self
        while rung.panoramas > 1:
            rung = replace(rung, panoramas=-(-rung.panoramas // 2))
            yield rung
        for chunk in CHUNKS:
            if rung.chunk_views is None or chunk < rung.chunk_views:
                yield Rung(1, chunk)
