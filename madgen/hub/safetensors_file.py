"""Read the headers of safetensors files, and describe files that are not safetensors. Imports no framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from madgen.utils.errors import UserError

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
AGAIN = "download it again"
PICKLE = "which can run code when loaded; convert it to .safetensors with the tool that made it"
KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
    (b"# xet version", "a Xet pointer, not the file itself; run `git xet pull` in its repository"),
    (b"\x1f\x8b", "compressed with gzip; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it with unzstd"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it with unxz"),
    (b"BZh", "compressed with bzip2; unpack it with bunzip2"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"GGUF", "a GGUF file, which is not supported; use the .safetensors file"),
    (b"\x89HDF", "an HDF5 file, which is not supported; use the .safetensors file"),
    (b"\x89PNG", "a PNG image; use the .safetensors file"),
    (b"PK\x03\x04", f"a zip archive, as PyTorch saves pickles, {PICKLE}"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), f"a pickle, {PICKLE}"),
)
"""Files that are given or downloaded in place of weights, by their first bytes."""


class Header(NamedTuple):
    """Header of a safetensors file."""

    tensors: dict[str, dict[str, Any]]
    """dtype, shape and data_offsets by name."""
    metadata: dict[str, str]


def read_header(file: Path, name: str) -> Header:
    """Return the header of a complete safetensors file. Raises UserError that names the file and describes its content.

    `name` is the setting with its value, such as `backbone.pretrained=model.safetensors`.
    """
    try:
        content = _parse(file)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{name} is {error}") from error
    metadata = content.pop("__metadata__", None)
    return Header(content, metadata if isinstance(metadata, dict) else {})


def damaged_file(folder: Path) -> str | None:
    """Return the first incomplete .safetensors file below a folder, with a description; None if all are complete.

    Variants and files that are not loaded count too, so ask only where loading failed.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            _parse(file)
        except OSError as error:
            return f"{file} is not readable: {error.strerror or error}"
        except ValueError as error:
            return f"{file} is {error}"
    return None


def _parse(file: Path) -> dict[str, Any]:
    """Return the content of the header. Raises ValueError that describes the file if it is not complete."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(512)
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        header = stream.read(length) if size >= 8 and length <= min(MAX_HEADER, size - 8) else b""
    try:
        content = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError(file_kind(start, size) or _bad_header(start, length, size)) from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"not a safetensors file: its header is not a JSON object of objects; {AGAIN}")
    ends = [entry.get("data_offsets") for name, entry in content.items() if name != "__metadata__"]
    if not all(isinstance(end, list) and len(end) == 2 and all(type(at) is int for at in end) for end in ends):
        raise ValueError(f"not a safetensors file: its header lacks data_offsets; {AGAIN}")
    expected = 8 + length + max((end[1] for end in ends), default=0)
    if size < expected:
        raise ValueError(f"truncated: it has {size:,} of {expected:,} bytes; {AGAIN}")
    if size > expected:
        raise ValueError(f"damaged: it has {size - expected:,} bytes more than the {expected:,} of its header; {AGAIN}")
    return content


def file_kind(start: bytes, size: int) -> str | None:
    """Describe a file that is neither safetensors nor JSON by its first 512 bytes; None if they are unknown."""
    if size == 0:
        return f"empty; {AGAIN}"
    for first, kind in KINDS:
        if start.startswith(first):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<body")):
        return "a web page (HTML), such as a login or error page; download the file itself"
    return None


def _bad_header(start: bytes, length: int, size: int) -> str:
    if start.lstrip()[:1] in (b"{", b"["):
        return "JSON text instead of weights; download the file itself"
    if size < 8:
        return f"truncated: it has {size} bytes; {AGAIN}"
    swapped = int.from_bytes(start[:8], "big")
    if 0 < swapped <= size - 8 and start[8:9] == b"{":
        return "damaged: the length of its header has the wrong byte order (big-endian); convert it again"
    if 0 < length <= MAX_HEADER and start[8:9] == b"{":
        return f"truncated: it has {size:,} bytes, its header alone needs {length + 8:,}; {AGAIN}"
    return f"not a safetensors file: it begins with {start[:8]!r}; {AGAIN}"
