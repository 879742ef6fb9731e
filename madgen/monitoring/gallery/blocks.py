"""The data of a page: a JSON block per sample, escaped so that no prompt can act as markup, and its images."""

from __future__ import annotations

import base64
import io
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import Sample
from madgen.monitoring.gallery.samples import CAPTIONS, decoded, find_inputs, load_inputs, read, spread
from madgen.utils.escaping import json_block
from madgen.utils.ordered_map import ordered_map

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


def write_samples(
    file: BinaryIO,
    dataset: DatasetDir,
    shown: Sequence[SampleEntry],
    preview: int | None,
    progress: Callable[[int, int], Any],
) -> None:
    """Write a block per sample (`s0`, `s1`, ..), then one per large image (`f0`, ..), so that thumbnails load first."""
    side, inputs = SIDES[len(shown) > FEW], find_inputs(dataset, shown)

    def blocks(number: int) -> tuple[bytes, bytes]:
        sample = read(dataset, shown[number])
        thumbnail, picture = _images(sample, side, preview)
        details = {"thumbnail": thumbnail, "preview": preview, **_details(dataset, sample)}
        details["inputs"] = [
            {"caption": CAPTIONS[name], "picture": _input(image, 2 * side)}
            for name, image in load_inputs(sample.metadata, inputs).items()
        ]
        return json_block(f"s{number}", details), b"" if picture is None else json_block(f"f{number}", picture)

    with tempfile.TemporaryFile() as pictures:
        for done, (details, picture) in enumerate(ordered_map(blocks, range(len(shown))), start=1):
            file.write(details)
            pictures.write(picture)
            progress(done, len(shown))
        pictures.seek(0)
        shutil.copyfileobj(pictures, file)


def _images(sample: Sample, side: int, preview: int | None) -> tuple[str, str | None]:
    """Return the data URIs of a thumbnail of shorter side `side` and of the image that `choose_preview` chose."""
    image = decoded(sample, _box(sample.entry, max(side, preview or 0)))
    large = None
    if preview == 0:
        large = _data_uri(MIME_TYPES[sample.format], sample.image)
    elif preview is not None:
        large = _data_uri("image/webp", _webp(image, PREVIEW_QUALITY))
    image.thumbnail(_box(sample.entry, side), Image.Resampling.LANCZOS)
    return _data_uri("image/webp", _webp(image, THUMBNAIL_QUALITY)), large


def _input(image: Image.Image, side: int) -> str:
    """Return the data URI of an input picture, scaled down to a shorter side of `side` pixels."""
    image.thumbnail(_box(image, side))
    return _data_uri("image/webp", _webp(image, THUMBNAIL_QUALITY))


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _webp(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=quality, method=2)
    return stream.getvalue()


def _box(shape: SampleEntry | Image.Image, side: int) -> tuple[int, int]:
    """Return the maximum width and height in pixels of an image whose shorter side is at most `side`."""
    longer = side * MAX_ASPECT
    return (longer, side) if shape.width >= shape.height else (side, longer)


def _details(dataset: DatasetDir, sample: Sample) -> dict[str, Any]:
    entry, sampling = sample.entry, sample.metadata.get("sampling")
    return {
        "rows": list(_rows(sample.metadata)),
        "loop": isinstance(sampling, dict) and sampling.get("loop") is True,
        "shard": dataset.tar(entry.shard).name,
        "offset": entry.offset,
        "size": entry.size,
        "member": f"{entry.key}.{sample.format}",
        "command": shlex.join(["madgen", "regenerate", str(dataset.root), entry.key, "-o", f"{entry.key}.png"]),
    }


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of the metadata as (dotted name, text); text, as browsers round integers above 2**53."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _rows(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
