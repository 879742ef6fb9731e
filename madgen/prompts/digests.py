"""Digests of a plan, updated while it is read; independent of how rows are split into batches and files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat
from typing import TypeVar

import numpy as np
import pyarrow as pa

from madgen.types import sample_key

T = TypeVar("T")
CHUNK_BYTES = 1 << 22  # keys in memory at a time


class KeysDigest:
    """sha256 over all planned keys, one per line, in order; `verify` compares the shards with it."""

    def __init__(self, samples_per_prompt: int, prefix: str = ""):
        self._digest, self._prefix = hashlib.sha256(), prefix
        self.set_samples(range(samples_per_prompt))

    def set_samples(self, numbers: range) -> None:
        """Set the numbers of the samples of each prompt that is appended from now on."""
        self._template = "".join(f"{sample_key(self._prefix, chr(0), number)}\n" for number in numbers)

    def update(self, ids: Sequence[str]) -> None:
        """Append ids, in order."""
        step = max(1, CHUNK_BYTES // len(self._template))
        for start in range(0, len(ids), step):
            lines = map(self._template.replace, repeat("\0"), ids[start : start + step])
            self._digest.update("".join(lines).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class PromptsDigest:
    """blake2b over four streams: ids, texts, their lengths in bytes, and the other fields of each prompt.

    Ids and texts are hashed as concatenated UTF-8; lengths as pairs of little-endian uint64 (id, text); other fields
    (see `rest_identity`) as `count rest newline`, once for each run of equal values.
    """

    def __init__(self) -> None:
        self._ids, self._texts, self._lengths, self._rests = (hashlib.blake2b() for _ in range(4))
        self._rest, self._count = "", 0

    def update(self, ids: pa.Array, texts: pa.Array) -> None:
        """Append rows: string arrays of equal length."""
        lengths = np.empty((len(ids), 2), "<u8")
        for column, (array, digest) in enumerate(((ids, self._ids), (texts, self._texts))):
            offsets, data = offsets_of(array), array.buffers()[2]
            lengths[:, column] = np.diff(offsets)
            digest.update(memoryview(data)[offsets[0] : offsets[-1]] if data is not None else b"")
        self._lengths.update(lengths.data)

    def update_rests(self, rests: Iterable[tuple[str, int]]) -> None:
        """Append the other fields of the same rows, as runs (rest, number of rows)."""
        closed = []
        for rest, count in rests:
            if rest != self._rest:
                closed.append(self._run())
                self._rest, self._count = rest, 0
            self._count += count
        self._rests.update("".join(closed).encode())

    def _run(self) -> str:
        return f"{self._count} {self._rest}\n" if self._count else ""

    def hexdigest(self) -> str:
        """Return 32 hex digits; the digest must not be updated afterwards."""
        self._rests.update(self._run().encode())
        parts = (self._ids, self._texts, self._lengths, self._rests)
        return hashlib.blake2b(b"".join(part.digest() for part in parts), digest_size=16).hexdigest()


def runs(values: Iterable[T]) -> list[tuple[T, int]]:
    """Return the runs of equal consecutive values, with their lengths."""
    return [(value, sum(1 for _ in run)) for value, run in groupby(values)]


def offsets_of(array: pa.Array) -> np.ndarray:
    """Return the offsets [len + 1] of an array's strings in its data buffer."""
    kind = np.int64 if pa.types.is_large_string(array.type) else np.int32
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array) + 1]
