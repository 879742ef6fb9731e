"""The digests of a plan, taken while it is read. Neither depends on how rows are cut into batches or files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
import pyarrow as pa

AT_ONCE = 1 << 22  # bytes of keys that are held for a moment


class KeysDigest:
    """sha256 over every planned key, one a line, in order: what `verify` holds the shards against."""

    def __init__(self, samples_per_prompt: int):
        self._digest = hashlib.sha256()
        self._template = "".join(f"\0-{index:04d}\n" for index in range(samples_per_prompt))

    def update(self, ids: Sequence[str]) -> None:
        """Further ids, in order."""
        step = max(1, AT_ONCE // len(self._template))
        for start in range(0, len(ids), step):
            lines = map(self._template.replace, repeat("\0"), ids[start : start + step])
            self._digest.update("".join(lines).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class PromptsDigest:
    """blake2b over four streams: all ids, all texts, the length of each in bytes, and runs of all that is left.

    Ids and texts are hashed as UTF-8, one after the other; lengths as pairs of little-endian uint64 (id, text); and
    what is left of a prompt (see `rest_identity`) as `count rest newline`, once for each run of equal ones.
    """

    def __init__(self) -> None:
        self._ids, self._texts, self._lengths, self._rests = (hashlib.blake2b() for _ in range(4))
        self._rest, self._count = "", 0

    def update(self, ids: pa.Array, texts: pa.Array) -> None:
        """Further rows: two arrays of texts."""
        lengths = np.empty((len(ids), 2), "<u8")
        for column, (array, digest) in enumerate(((ids, self._ids), (texts, self._texts))):
            offsets, data = offsets_of(array), array.buffers()[2]
            lengths[:, column] = np.diff(offsets)
            digest.update(memoryview(data)[offsets[0] : offsets[-1]] if data is not None else b"")
        self._lengths.update(lengths.data)

    def update_rests(self, rests: Iterable[tuple[str, int]]) -> None:
        """What is left of the same rows, as (rest, how many rows in succession)."""
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
        """32 hex digits; nothing can be added after it."""
        self._rests.update(self._run().encode())
        parts = (self._ids, self._texts, self._lengths, self._rests)
        return hashlib.blake2b(b"".join(part.digest() for part in parts), digest_size=16).hexdigest()


def offsets_of(array: pa.Array) -> np.ndarray:
    """Integers [len + 1]: where each text of an array begins in its data, and where the last one ends."""
    kind = np.int64 if pa.types.is_large_string(array.type) else np.int32
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array) + 1]
