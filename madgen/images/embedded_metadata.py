"""Metadata embedded in image files, so that an image without its JSON still has its prompt, seed and settings.

PNG: text chunks `parameters` (the sample's JSON) and `Description` (the prompt). JPEG and WebP: the same in an XMP
packet. Loops also have GPano fields in XMP, for panorama viewers. Everything is a function of the sample's JSON.
"""

from __future__ import annotations

import json
import re
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
