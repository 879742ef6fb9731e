"""Metadata embedded in image files, so that an image without its JSON still has its prompt, seed and settings.

PNG: text chunks `parameters` (the sample's JSON) and `Description` (the prompt). JPEG and WebP: the same in an XMP
packet. Loops also have GPano fields in XMP, for panorama viewers. Everything is a function of the sample's JSON, and
can be replaced without encoding the pixels again.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

VERSION = 1
"""Increase it when the bytes of a sample change; a dataset of another version is then not resumed."""
MAX_BYTES = 56_000
"""Size of `parameters`; JPEG allows packets of 65,504 bytes."""
NAMESPACE = "urn:madgen:1:"
NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Characters that are invalid in XML, PNG text or a terminal."""
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
GPANO = "http://ns.google.com/photos/1.0/panorama/"
DC = "http://purl.org/dc/elements/1.1/"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"
"""Start of the APP1 segment of a JPEG that holds XMP."""


def parameters(metadata: Mapping[str, Any]) -> str:
    """Return the sample's JSON as one line of ASCII. If it is too long, it is shortened and has `cut: true`.

    Long strings and lists are truncated first; if that is not enough, only key, seed and fingerprint remain.
    """
    essential = {name: metadata[name] for name in ("key", "seed", "fingerprint") if name in metadata}
    for candidate in (metadata, {**_short(metadata), "cut": True}, {**essential, "cut": True}):
        text = json.dumps(candidate, sort_keys=True)
        if len(quoteattr(text)) <= MAX_BYTES:
            return text
    return json.dumps({"cut": True})


def _short(value: Any, characters: int = 2000, items: int = 8) -> Any:
    if isinstance(value, str):
        return value if len(value) <= characters else f"{value[:characters]}…"
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value[:items]]
    return value


def description(metadata: Mapping[str, Any]) -> str:
    """Return the prompt as one line of at most 1000 characters."""
    text = NOT_PRINTABLE.sub("\ufffd", " ".join(str(metadata.get("prompt", "")).split()))
    return text if len(text) <= 1000 else f"{text[:999]}…"


def xmp(metadata: Mapping[str, Any] | None, gpano: Mapping[str, Any] | None = None) -> bytes:
    """Build an XMP packet of the parameters and the GPano fields, if any."""
    attributes, inner = [f'xmlns:GPano="{GPANO}"'] if gpano else [], ""
    attributes += [f"GPano:{name}={quoteattr(str(value))}" for name, value in (gpano or {}).items()]
    if metadata is not None:
        prompt = description(metadata).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        attributes += [f'xmlns:madgen="{NAMESPACE}"', f"madgen:parameters={quoteattr(parameters(metadata))}"]
        attributes += [f'xmlns:dc="{DC}"']
        inner = f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{prompt}</rdf:li></rdf:Alt></dc:description>'
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}">'
        f'<rdf:Description rdf:about="" {" ".join(attributes)}>{inner}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def gpano(height: int, width: int) -> dict[str, Any]:
    """Return the GPano fields of a full 360 degree cylinder.

    Not `equirectangular`: the rows of a sampled panorama are not angles, and viewers would distort them.
    """
    return {
        "ProjectionType": "cylindrical",
        "FullPanoWidthPixels": width,
        "FullPanoHeightPixels": height,
        "CroppedAreaImageWidthPixels": width,
        "CroppedAreaImageHeightPixels": height,
        "CroppedAreaLeftPixels": 0,
        "CroppedAreaTopPixels": 0,
    }


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
        if data[at + 1] == 0xE1 and data[at + 4 : at + 2 + size].startswith(XMP_SEGMENT):
            body = XMP_SEGMENT + packet
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
