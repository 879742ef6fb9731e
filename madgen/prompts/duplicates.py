"""Which ids were there before: 12 bytes a prompt, where a set of ten million ids would take a gigabyte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np

LONGEST_RUN = 1 << 20  # ids; merging longer runs would need more memory at once than it saves time

LONGEST_STEM = 88  # letters: an id has 96 at most, and a number comes behind it
MOST_REMEMBERED = 100_000  # ids of which the next free number is known


@dataclass(frozen=True)
class _Run:
    keys: np.ndarray
    """int64, sorted."""
    rows: np.ndarray
    """uint32, the row of each key."""


class IdIndex:
    """Finds the rows of ids. Hashes say where to look, `ids_at` (rows to their ids) has the last word.

    The hash is Python's own of the process: nothing that leaves this class depends on it.
    """

    def __init__(self, ids_at: Callable[[Sequence[int]], list[str]]):
        self._ids_at = ids_at
        self._runs: list[_Run] = []

    def add(self, ids: Sequence[str], first_row: int) -> None:
        """Ids of consecutive rows, none of which is there yet."""
        keys = _keys(ids)
        order = np.argsort(keys)
        self._runs.append(_Run(keys[order], (order + first_row).astype(np.uint32)))
        while len(self._runs) > 1 and self._runs[-2].keys.size <= self._runs[-1].keys.size:
            if self._runs[-2].keys.size + self._runs[-1].keys.size > LONGEST_RUN:
                return
            self._runs.append(_merged(self._runs.pop(-2), self._runs.pop(-1)))

    def find(self, ids: Sequence[str]) -> dict[int, int]:
        """From positions in `ids` to the rows of those that are there."""
        keys = _keys(ids)
        order = np.argsort(keys)
        sorted_keys = keys[order]  # neighbours look at the same pages of a run
        positions: list[int] = []
        rows: list[int] = []
        for run in self._runs:
            left = np.searchsorted(run.keys, sorted_keys)
            hits = np.flatnonzero(run.keys[np.minimum(left, run.keys.size - 1)] == sorted_keys)
            if hits.size:
                right = np.searchsorted(run.keys, sorted_keys[hits], side="right")
                for hit, start, stop in zip(hits, left[hits], right, strict=True):
                    rows += run.rows[start:stop].tolist()
                    positions += [int(order[hit])] * int(stop - start)
        found = self._ids_at(rows) if rows else []
        return {at: row for at, row, name in zip(positions, rows, found, strict=True) if name == ids[at]}


class FreeNames:
    """Other names for ids that are taken: the first of `id-2`, `id-3`, ... that no row before has."""

    def __init__(self, index: IdIndex):
        self._index = index
        self._numbers: dict[str, int] = {}  # all below are taken
        self._unused: set[str] = set()  # known not to be in the index

    def look_ahead(self, ids: Sequence[str], taken: Container[int]) -> None:
        """Looks up at once what `free` is likely to ask; `taken`: positions of those that are in the index."""
        seen: set[str] = set()
        times: Counter[str] = Counter()
        guesses = []
        for position, name in enumerate(ids):
            if position in taken or name in seen:
                stem = name[:LONGEST_STEM]
                guesses.append(f"{stem}-{self._numbers.get(stem, 2) + times[stem]}")
                times[stem] += 1
            seen.add(name)
        found = self._index.find(guesses)
        self._unused = {guess for at, guess in enumerate(guesses) if at not in found}

    def free(self, taken: str, here: Container[str]) -> str:
        """A name that is neither in the index, which is as it was in `look_ahead`, nor in `here`."""
        stem = taken[:LONGEST_STEM]
        number = self._numbers.get(stem, 2)
        while (name := f"{stem}-{number}") in here or (name not in self._unused and self._index.find([name])):
            number += 1
        if len(self._numbers) >= MOST_REMEMBERED:
            self._numbers.clear()
        self._numbers[stem] = number + 1
        return name


def _keys(ids: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(hash, ids), np.int64, len(ids))


def _merged(first: _Run, second: _Run) -> _Run:
    keys = np.concatenate((first.keys, second.keys))
    order = np.argsort(keys, kind="stable")  # merges sorted runs, where the default would sort anew
    return _Run(keys[order], np.concatenate((first.rows, second.rows))[order])
