"""Read the samples of a dataset one by one, those in open shards included."""

from __future__ import annotations

import io

from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import EncodedSample, read_encoded
from madgen.dataset.shards.journal import open_samples
from madgen.types import shard_index
from madgen.utils.errors import UserError


def present_samples(dataset: DatasetDir) -> list[SampleEntry]:
    """Return every sample, in the order of the shards, finished or open. Raises UserError if there is none."""
    entries = sorted([*dataset.entries(), *open_samples(dataset)], key=lambda entry: shard_index(entry.shard))
    if not entries:
        raise UserError(f"{dataset.root} has no samples yet; madgen status shows the progress")
    return entries


def spread(entries: list[SampleEntry], limit: int | None) -> list[SampleEntry]:
    """Return at most `limit` samples, evenly spaced from the first to the last."""
    if limit is not None and limit < 1:
        raise UserError(f"limit must be >= 1, got {limit}")
    if limit is None or limit >= len(entries):
        return entries
    return [entries[index * (len(entries) - 1) // max(limit - 1, 1)] for index in range(limit)]


def read(dataset: DatasetDir, entry: SampleEntry) -> EncodedSample:
    """Read a sample. Raises UserError if its shard is damaged."""
    try:
        return read_encoded(dataset, entry)
    except OSError as error:
        raise UserError(f"{dataset.tar(entry.shard)} cannot be read: {error.strerror or error}") from None


def decoded(sample: EncodedSample, box: tuple[int, int]) -> Image.Image:
    """Decode an image as RGB, downscaled to fit a box of (width, height) pixels."""
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.thumbnail(box, Image.Resampling.LANCZOS)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        entry = sample.entry
        raise UserError(f"the image of {entry.key} in {entry.shard} is unreadable: {error}") from None
