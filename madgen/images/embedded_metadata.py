"""What a picture file says of itself, so that it can be traced when it is away from its JSON: prompt, seed, settings.

In PNG files text chunks, `parameters` (the sample's JSON) and `Description` (the prompt), in JPEG and WebP files the
same in one XMP packet. On loops XMP also has GPano's fields, for viewers. A function of the sample's JSON alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

VERSION = 1
"""Raised when the bytes of the same sample change: the fingerprint then refuses to go on with a dataset of another."""
MOST = 56_000
"""Bytes of `parameters`: JPEG takes packets of 65 504."""
NAMESPACE = "urn:madgen:1:"
NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""What XML, PNG text or a terminal cannot bear."""
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
GPANO = "http://ns.google.com/photos/1.0/panorama/"
DC = "http://purl.org/dc/elements/1.1/"


def parameters(metadata: Mapping[str, Any]) -> str:
    """The sample's JSON in ASCII on one line; where it is longer than a picture can hold, with `cut: true`.

    Then long texts and lists in it are cut short, and in the worst case all but key, seed and fingerprint left out.
    """
    named = {name: metadata[name] for name in ("key", "seed", "fingerprint") if name in metadata}
    for candidate in (metadata, {**_short(metadata), "cut": True}, {**named, "cut": True}):
        text = json.dumps(candidate, sort_keys=True)
        if len(quoteattr(text)) <= MOST:
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
    """The prompt in one line of at most 1000 characters."""
    text = NOT_PRINTABLE.sub("\ufffd", " ".join(str(metadata.get("prompt", "")).split()))
    return text if len(text) <= 1000 else f"{text[:999]}…"


def xmp(metadata: Mapping[str, Any] | None, gpano: Mapping[str, Any] | None = None) -> bytes:
    """One packet with the parameters, and the GPano fields if there are any."""
    attributes, inner = [f'xmlns:GPano="{GPANO}"'] if gpano else [], ""
    attributes += [f"GPano:{name}={quoteattr(str(value))}" for name, value in (gpano or {}).items()]
    if metadata is not None:
        told = description(metadata).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        attributes += [f'xmlns:madgen="{NAMESPACE}"', f"madgen:parameters={quoteattr(parameters(metadata))}"]
        attributes += [f'xmlns:dc="{DC}"']
        inner = f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{told}</rdf:li></rdf:Alt></dc:description>'
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}">'
        f'<rdf:Description rdf:about="" {" ".join(attributes)}>{inner}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def gpano(height: int, width: int) -> dict[str, Any]:
    """That these pixels go once around, on a cylinder.

    Not `equirectangular`: the rows of a sampled panorama are not angles, and a viewer would bend them.
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
