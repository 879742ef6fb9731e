"""How much of a picture a page embeds: always a thumbnail, and of what is shown large as much as its budget allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.monitoring.gallery.samples import Sample, read, spread

MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""Member suffix of a picture to its media type."""
SIDES = (128, 96)
"""Pixels of a thumbnail's shorter side: on a page of at most `FEW` panoramas, and on a larger one."""
FEW = 2_000
LONGEST = 8
"""A thumbnail's or preview's longer side never exceeds so many of its shorter sides."""
PREVIEWS = (512, 256)
"""Pixels of the shorter side of a preview, which stands in for originals that are too much for a page."""
THUMBNAIL_QUALITY, PREVIEW_QUALITY = 70, 82
MEASURED = 8
"""Pictures whose previews are made to estimate those of all."""


def choose_preview(dataset: DatasetDir, shown: Sequence[SampleEntry], budget: int) -> int | None:
    """What a page of these samples embeds beside thumbnails, of each alike: the best that stays within `budget` bytes.

    0: the original bytes. A positive number: a preview of that shorter side, by an estimate. None: nothing.
    """
    if sum(entry.size for entry in shown) <= budget:
        return 0
    some = [read(dataset, entry) for entry in spread(list(shown), MEASURED)]
    for side in PREVIEWS:
        images = (sample.decoded(_box(sample.entry, side)) for sample in some)
        mean = sum(len(_webp(image, PREVIEW_QUALITY)) for image in images) / len(some)
        if mean * len(shown) <= budget:
            return side
    return None


def embedded(sample: Sample, side: int, preview: int | None) -> tuple[str, str | None]:
    """Two data URIs: a thumbnail whose shorter side has at most `side` pixels, and what `choose_preview` says."""
    image = sample.decoded(_box(sample.entry, max(side, preview or 0)))
    large = None
    if preview == 0:
        large = _data_uri(MIME_TYPES[sample.suffix], sample.picture)
    elif preview is not None:
        large = _data_uri("image/webp", _webp(image, PREVIEW_QUALITY))
    image.thumbnail(_box(sample.entry, side), Image.Resampling.LANCZOS)
    return _data_uri("image/webp", _webp(image, THUMBNAIL_QUALITY)), large


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _webp(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=quality, method=2)
    return stream.getvalue()


def _box(entry: SampleEntry, side: int) -> tuple[int, int]:
    """Width and height in pixels."""
    most = side * LONGEST
    return (most, side) if entry.width >= entry.height else (side, most)
