"""Records to bytes. Nothing that depends on when, where or by whom a panorama was made goes in."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from madgen.dataset.layout import to_json
from madgen.types import Record


def encode_image(image_HWC: np.ndarray, image_format: str, quality: int) -> bytes:
    """PNG (lossless), JPEG without chroma subsampling, or WebP; `quality` 1..100 for the latter two."""
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG", "compress_level": 6},
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": 0, "optimize": True},
        "webp": {"format": "WEBP", "quality": quality, "method": 4},
    }
    stream = io.BytesIO()
    Image.fromarray(image_HWC).save(stream, **options[image_format])
    return stream.getvalue()


def encode_record(record: Record, image_format: str, quality: int) -> dict[str, Any]:
    """A WebDataset sample: `<key>.png`, `<key>.json`, `<key>.txt`."""
    return {
        "__key__": record.task.key,
        image_format: encode_image(record.image_HWC, image_format, quality),
        "json": to_json(record.metadata),
        "txt": record.task.prompt.text.encode(),
    }
