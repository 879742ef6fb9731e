"""Replace the metadata in an encoded image without encoding its pixels again."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

from madgen.images.embedded_metadata import gpano, parameters, xmp

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_NAMESPACE = b"http://ns.adobe.com/xap/1.0/\0"


def with_metadata(data: bytes, image_format: str, metadata: Mapping[str, Any]) -> bytes:
    """Return a png, jpg or webp file with the JSON of its sample replaced by `metadata`; unchanged if it has none.

    The bytes are those of `madgen.dataset.encoding.encode_image` for the same pixels. Raises ValueError for files that
    are not of this format.
    """
    if image_format == "png":
        return _replace_png_text(data, metadata)
    is_loop = bool(metadata.get("sampling", {}).get("loop"))
    packet = xmp(metadata, gpano(metadata["height"], metadata["width"]) if is_loop else None)
    return (_replace_jpeg_xmp if image_format == "jpg" else _replace_webp_xmp)(data, packet)


def _replace_png_text(data: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Replace the text chunk `parameters`, which is length (4 bytes), type (4), content and CRC (4)."""
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("no PNG file")
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and content.startswith(b"parameters\0"):
            body = kind + b"parameters\0" + parameters(metadata).encode("latin-1")
            chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
            return data[:at] + chunk + data[at + 12 + size :]
        at += 12 + size
    return data


def _replace_jpeg_xmp(data: bytes, packet: bytes) -> bytes:
    """Replace the APP1 segment with XMP: marker (2 bytes), length (2, itself included), namespace and packet."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG file")
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:  # the scan begins
        (size,) = struct.unpack(">H", data[at + 2 : at + 4])
        if data[at + 1] == 0xE1 and data[at + 4 : at + 2 + size].startswith(XMP_NAMESPACE):
            body = XMP_NAMESPACE + packet
            return data[: at + 2] + struct.pack(">H", len(body) + 2) + body + data[at + 2 + size :]
        at += 2 + size
    return data


def _replace_webp_xmp(data: bytes, packet: bytes) -> bytes:
    """Replace the chunk `XMP `: type (4 bytes), length (4) and content, padded to an even length."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("no WebP file")
    at = 12
    while at + 8 <= len(data):
        (size,) = struct.unpack("<I", data[at + 4 : at + 8])
        end = at + 8 + size + size % 2
        if data[at : at + 4] == b"XMP ":
            chunk = b"XMP " + struct.pack("<I", len(packet)) + packet + bytes(len(packet) % 2)
            content = data[12:at] + chunk + data[end:]
            return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content
        at = end
    return data
