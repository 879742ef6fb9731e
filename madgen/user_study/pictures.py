"""The pictures of a study as the page embeds them: encoded anew, all alike, without a word of where they come from."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from madgen.dataset.reader import read_entry
from madgen.user_study.design import Picture, Source
from madgen.utils.errors import UserError

MOST_PIXELS = 4096
"""Longest side in the page; larger pictures are shrunk."""
QUALITY = 92
"""Of WebP; the same for all, so that no method is told by its files."""
BLURRED = 16
"""Pixels that the shorter side of a blurred picture has left."""


def render(picture: Picture, sources: Sequence[Source]) -> bytes:
    """WebP of a picture; UserError if its sample is damaged."""
    image = Image.fromarray(_pixels(picture, sources))
    image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=QUALITY, method=4)
    return stream.getvalue()


def _pixels(picture: Picture, sources: Sequence[Source]) -> np.ndarray:
    own = _read(sources[picture.source], picture.key)
    if picture.kind == "blurred":
        return blurred(own)
    if picture.kind == "patchwork":
        return patchwork([own, *(_read(sources[source], key) for source, key in picture.others)])
    return own


def _read(source: Source, key: str) -> np.ndarray:
    place = source.samples[key]
    try:
        return read_entry(source.directory, place.shard, place._asdict() | {"key": key}).image_HWC
    except (OSError, tarfile.TarError, KeyError, ValueError, StopIteration, AttributeError) as error:
        where = source.directory.tar(place.shard)
        raise UserError(f"{where}: {key} cannot be read ({error}); see madgen verify {source.directory.root}") from None


def blurred(image_HWC: np.ndarray) -> np.ndarray:
    """The same picture as if of `BLURRED` pixels."""
    image = Image.fromarray(image_HWC)
    scale = BLURRED / min(image.size)
    coarse = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC))


def patchwork(images_HWC: Sequence[np.ndarray]) -> np.ndarray:
    """View-sized pieces of the pictures in turn, side by side along the longer side, none beside one it was beside.

    A view is taken to be a square of the shorter side; there are at least four pieces. All pictures have one size.
    """
    height, width = images_HWC[0].shape[:2]
    axis = 1 if width >= height else 0
    count = max(4, max(height, width) // min(height, width))
    pieces = [np.array_split(image, count, axis) for image in images_HWC]
    order = [*range(1, count, 2), *range(0, count, 2)]
    mixed = np.concatenate([pieces[at % len(pieces)][piece] for at, piece in enumerate(order)], axis)
    return np.ascontiguousarray(mixed)
