"""Build and read Arrow arrays without pandas, which `pyarrow.array` and `to_numpy` import where it is installed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def string_array(values: Sequence[str | None], kind: pa.DataType) -> pa.Array:
    """Return an array of `pyarrow.string()` or `pyarrow.large_string()`; None is null."""
    data = [b"" if value is None else value.encode() for value in values]
    offsets = np.zeros(len(data) + 1, np.int64 if kind == pa.large_string() else np.int32)
    np.cumsum(np.fromiter(map(len, data), np.int64, len(data)), out=offsets[1:], dtype=offsets.dtype)
    valid = None
    if None in values:
        bits = np.packbits([value is not None for value in values], bitorder="little")
        valid = pa.py_buffer(bits.tobytes())
    return pa.Array.from_buffers(kind, len(data), [valid, pa.py_buffer(offsets), pa.py_buffer(b"".join(data))])


def integer_array(values: Sequence[int] | np.ndarray) -> pa.Array:
    """Return an array of `pyarrow.int64()`."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.array(values, np.int64))])


def integers(array: pa.Array) -> np.ndarray:
    """Return the values of an array of integers without nulls, not copied."""
    return np.from_dlpack(array)


def booleans(array: pa.Array) -> np.ndarray:
    """Return the values of an array of booleans without nulls."""
    return integers(array.cast(pa.uint8())).astype(bool)


def validity(array: pa.Array) -> np.ndarray:
    """Return which values are not null, as booleans."""
    return booleans(array.is_valid())
