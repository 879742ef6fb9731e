"""Images that a page embeds: a thumbnail per sample, and a larger one as far as the budget allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import EncodedSample
from madgen.monitoring.gallery.samples import decoded, read, spread

MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""Media type by file suffix."""
SIDES = (128, 96)
"""Shorter side of a thumbnail in pixels: on a page of at most `FEW` panoramas, and on a larger page."""
FEW = 2_000
MAX_ASPECT = 8
"""Maximum aspect ratio of thumbnails and previews."""
PREVIEWS = (512, 256)
"""Shorter side in pixels of previews, which replace originals that exceed the budget."""
THUMBNAIL_QUALITY, PREVIEW_QUALITY = 70, 82
MEASURED = 8
"""Number of samples that the size of all previews is estimated from."""


def choose_preview(dataset: DatasetDir, shown: Sequence[SampleEntry], budget: int) -> int | None:
    """Choose the best images within `budget` bytes, the same for all samples.

    Returns 0 for the original files, the shorter side of previews (by an estimate), or None for thumbnails only.
    """
    if sum(entry.size for entry in shown) <= budget:
        return 0
    some = [read(dataset, entry) for entry in spread(list(shown), MEASURED)]
    for side in PREVIEWS:
        images = (decoded(sample, _box(sample.entry, side)) for sample in some)
        mean = sum(len(_webp(image, PREVIEW_QUALITY)) for image in images) / len(some)
        if mean * len(shown) <= budget:
            return side
    return None


def embedded(sample: EncodedSample, side: int, preview: int | None) -> tuple[str, str | None]:
    """Return the data URIs of a thumbnail of shorter side `side` and of the image that `choose_preview` chose."""
    image = decoded(sample, _box(sample.entry, max(side, preview or 0)))
    large = None
    if preview == 0:
        large = _data_uri(MIME_TYPES[sample.format], sample.image)
    elif preview is not None:
        large = _data_uri("image/webp", _webp(image, PREVIEW_QUALITY))
    image.thumbnail(_box(sample.entry, side), Image.Resampling.LANCZOS)
    return _data_uri("image/webp", _webp(image, THUMBNAIL_QUALITY)), large


def thumbnail_of(image: Image.Image, side: int) -> str:
    """Return the data URI of an image, scaled down to a shorter side of `side` pixels."""
    image.thumbnail((MAX_ASPECT * side, side) if image.width >= image.height else (side, MAX_ASPECT * side))
    return _data_uri("image/webp", _webp(image, THUMBNAIL_QUALITY))


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _webp(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=quality, method=2)
    return stream.getvalue()


def _box(entry: SampleEntry, side: int) -> tuple[int, int]:
    """Return the maximum width and height in pixels."""
    longer = side * MAX_ASPECT
    return (longer, side) if entry.width >= entry.height else (side, longer)
