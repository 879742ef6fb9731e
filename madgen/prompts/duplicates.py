"""Detect duplicate ids with 12 bytes per prompt; a Python set of ten million ids would take a gigabyte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np

MAX_RUN = 1 << 20  # ids; merging longer runs needs much memory and saves little time

MAX_STEM = 88  # letters: an id has at most 96, including the number
MAX_NUMBERS = 100_000  # ids whose next free number is remembered


@dataclass(frozen=True)
class _Run:
    keys: np.ndarray
    """int64, sorted."""
    rows: np.ndarray
    """uint32, the row of each key."""


class IdIndex:
    """Index from ids to rows by hash; `ids_at` (rows to ids) resolves collisions.

    The hash is Python's, which differs between processes; results do not depend on it.
    """

    def __init__(self, ids_at: Callable[[Sequence[int]], list[str]]):
        self._ids_at = ids_at
        self._runs: list[_Run] = []

    def add(self, ids: Sequence[str], first_row: int) -> None:
        """Add ids of consecutive rows; none may be in the index yet."""
        keys = _keys(ids)
        order = np.argsort(keys)
        self._runs.append(_Run(keys[order], (order + first_row).astype(np.uint32)))
        while len(self._runs) > 1 and self._runs[-2].keys.size <= self._runs[-1].keys.size:
            if self._runs[-2].keys.size + self._runs[-1].keys.size > MAX_RUN:
                return
            self._runs.append(_merged(self._runs.pop(-2), self._runs.pop(-1)))

    def find(self, ids: Sequence[str]) -> dict[int, int]:
        """Return {position in `ids`: row} of those in the index."""
        keys = _keys(ids)
        order = np.argsort(keys)
        sorted_keys = keys[order]  # locality in the pages of a run
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
        names = self._ids_at(rows) if rows else []
        return {at: row for at, row, name in zip(positions, rows, names, strict=True) if name == ids[at]}


class FreeNames:
    """Renames duplicate ids: the first of `id-2`, `id-3`, ... that no earlier row has."""

    def __init__(self, index: IdIndex):
        self._index = index
        self._numbers: dict[str, int] = {}  # smaller numbers are taken
        self._unused: set[str] = set()  # names not in the index

    def look_ahead(self, ids: Sequence[str], taken: Container[int]) -> None:
        """Look up the likely results of `free` together; `taken`: positions of `ids` that are in the index."""
        seen: set[str] = set()
        times: Counter[str] = Counter()
        guesses = []
        for position, name in enumerate(ids):
            if position in taken or name in seen:
                stem = name[:MAX_STEM]
                guesses.append(f"{stem}-{self._numbers.get(stem, 2) + times[stem]}")
                times[stem] += 1
            seen.add(name)
        used = self._index.find(guesses)
        self._unused = {guess for at, guess in enumerate(guesses) if at not in used}

    def free(self, taken: str, here: Container[str]) -> str:
        """Return a name that is neither in the index (unchanged since `look_ahead`) nor in `here`."""
        stem = taken[:MAX_STEM]
        number = self._numbers.get(stem, 2)
        while (name := f"{stem}-{number}") in here or (name not in self._unused and self._index.find([name])):
            number += 1
        if len(self._numbers) >= MAX_NUMBERS:
            self._numbers.clear()
        self._numbers[stem] = number + 1
        return name


def _keys(ids: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(hash, ids), np.int64, len(ids))


def _merged(first: _Run, second: _Run) -> _Run:
    keys = np.concatenate((first.keys, second.keys))
    order = np.argsort(keys, kind="stable")  # fast on two sorted runs
    return _Run(keys[order], np.concatenate((first.rows, second.rows))[order])
