"""Read the tar of a shard, and check every byte: headers and padding have one canonical form."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from madgen.dataset.format import FormatError
from madgen.dataset.layout import DatasetDir

READ_ERRORS = (tarfile.TarError, EOFError, ValueError, TypeError, ArithmeticError, LookupError)
"""Errors that `tarfile` raises for damaged headers."""


@dataclass
class TarSample:
    """Consecutive members with the same key, as WebDataset groups them."""

    key: str
    offset: int
    """First byte of the records, headers included."""
    size: int = 0
    """Bytes, headers and padding included."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Content by extension, in the order of the tar."""
    problems: list[str] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """Checksum of the records."""


def read_samples(stream: BinaryIO) -> Iterator[TarSample]:
    """Yield the samples of an open tar. Raises tarfile.TarError if the file is no tar, or does not end as one."""
    length, end = os.fstat(stream.fileno()).st_size, 0
    sample: TarSample | None = None
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if sample is not None and key != sample.key:
                    yield sample
                    sample = None
                sample = sample or TarSample(key, end)
                _add(stream, member, extension, end, length, sample)
                end = sample.offset + sample.size
        if sample is not None:
            yield sample
    except tarfile.TarError:
        raise
    except READ_ERRORS as error:
        raise tarfile.ReadError(f"damaged header after byte {end}: {error}") from error
    _check_end(stream, end, length)


def _add(stream: BinaryIO, member: tarfile.TarInfo, extension: str, start: int, length: int, sample: TarSample) -> None:
    """Append a member whose header follows at byte `start`."""
    size = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    end = member.offset_data + size
    if not member.isreg() or end > length:
        raise tarfile.ReadError(f"{member.name} {'ends beyond the file' if member.isreg() else 'is not a file'}")
    if extension in sample.members:
        raise tarfile.ReadError(f"{member.name} occurs twice")
    stream.seek(start)
    header, data = stream.read(member.offset_data - start), stream.read(size)
    for part in (header, data):
        sample.digest.update(part)
    if header != _canonical_header(member.name, member.size):
        sample.problems.append(f"the tar header of {member.name} is not as madgen writes it")
    if data[member.size :].strip(b"\0"):
        sample.problems.append(f"the padding after {member.name} is not zero")
    sample.members[extension] = data[: member.size]
    sample.size = end - sample.offset


def _canonical_header(name: str, size: int) -> bytes:
    """Return the header of a read-only file of user `madgen` without times."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "madgen", "madgen"
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def tar_size(end: int) -> int:
    """Return the size of a tar whose samples end at `end`: two blocks of zeros, up to a multiple of 20 blocks."""
    size = end + 2 * tarfile.BLOCKSIZE
    return size + -size % tarfile.RECORDSIZE


def check_size(directory: DatasetDir, shard: str, end: int) -> None:
    """Raise FormatError if the tar of a shard whose samples end at `end` has another size; it is not read.

    Raises FileNotFoundError if it is missing.
    """
    tar = directory.tar(shard)
    size, expected = tar.stat().st_size, tar_size(end)
    if size != expected:
        raise FormatError(
            f"{tar} has {size} bytes, expected {expected}; run madgen verify {directory.root} --repair, then generate "
            "again to remake its shard"
        )


def _check_end(stream: BinaryIO, end: int, length: int) -> None:
    """Raise tarfile.ReadError unless the zeros follow that end a tar."""
    zeros = tar_size(end) - end
    if length != end + zeros:
        raise tarfile.ReadError(f"{length - end} bytes follow its last sample, expected {zeros} that end a tar")
    stream.seek(end)
    if stream.read(zeros).strip(b"\0"):
        raise tarfile.ReadError(f"after its last sample (byte {end}) the bytes that end the tar are not zero")
