"""Render the images of a study, encoded alike so that they do not reveal their dataset, and those of controls."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from madgen.dataset.reader import read_entry
from madgen.user_study.design import Source, StudyImage
from madgen.utils.errors import UserError

MAX_SIDE = 4096
"""Pixels of the longer side; larger images are shrunk."""
QUALITY = 92
"""WebP quality."""
BLURRED_SIDE = 16
"""Pixels of the shorter side that a blurred image is reduced to."""


def render(image: StudyImage, sources: Sequence[Source]) -> bytes:
    """Return an image as WebP; raise UserError if its sample is damaged."""
    rendered = Image.fromarray(_pixels(image, sources))
    rendered.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    rendered.save(stream, format="WEBP", quality=QUALITY, method=4)
    return stream.getvalue()


def _pixels(image: StudyImage, sources: Sequence[Source]) -> np.ndarray:
    pixels = _read(sources[image.source], image.key)
    if image.kind == "blurred":
        return blurred(pixels)
    if image.kind == "patchwork":
        return patchwork([pixels, *(_read(sources[image.source], key) for key in image.others)])
    return pixels


def _read(source: Source, key: str) -> np.ndarray:
    sample = source.samples[key]
    try:
        return read_entry(source.directory, sample).image_HWC
    except OSError as error:
        tar = source.directory.tar(sample.shard)
        raise UserError(f"{tar}: cannot read {key} ({error}); see madgen verify {source.directory.root}") from None


def blurred(image_HWC: np.ndarray) -> np.ndarray:
    """Reduce an image to `BLURRED_SIDE` pixels and enlarge it again."""
    image = Image.fromarray(image_HWC)
    scale = BLURRED_SIDE / min(image.size)
    coarse = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC))


def patchwork(images_HWC: Sequence[np.ndarray]) -> np.ndarray:
    """Join view-sized pieces of images of one size, alternating between images, without any original neighbours.

    Pieces are about square, at least four, and side by side along the longer side.
    """
    height, width = images_HWC[0].shape[:2]
    axis = 1 if width >= height else 0
    count = max(4, max(height, width) // min(height, width))
    pieces = [np.array_split(image, count, axis) for image in images_HWC]
    order = [*range(1, count, 2), *range(0, count, 2)]
    mixed = np.concatenate([pieces[number % len(pieces)][piece] for number, piece in enumerate(order)], axis)
    return np.ascontiguousarray(mixed)
