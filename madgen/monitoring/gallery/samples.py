"""Read the samples of a dataset one by one, those in open shards included, and the pictures that they started from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from madgen.config.schema import PICTURE_FIELDS
from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import Sample, read_entry, read_metadata
from madgen.dataset.shards.journal import open_samples
from madgen.images.decoding import read_picture
from madgen.prompts.recorded_pictures import find_pictures
from madgen.types import PictureFile, shard_index
from madgen.utils.errors import UserError

CAPTIONS = {"image": "Started from", "mask": "Kept (white)", "control": "Control picture", "style": "Style picture"}
"""Captions of pictures that samples started from or followed, by column, in the order in which they are shown."""


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


def read(dataset: DatasetDir, entry: SampleEntry) -> Sample:
    """Read a sample. Raises UserError if its shard is damaged."""
    try:
        return read_entry(dataset, entry)
    except OSError as error:
        raise UserError(f"{dataset.tar(entry.shard)} cannot be read: {error.strerror or error}") from None


def decoded(sample: Sample, box: tuple[int, int]) -> Image.Image:
    """Decode an image as RGB, downscaled to fit a box of (width, height) pixels."""
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.thumbnail(box, Image.Resampling.LANCZOS)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        entry = sample.entry
        raise UserError(f"the image of {entry.key} in {entry.shard} is unreadable: {error}") from None


def find_inputs(dataset: DatasetDir, shown: Sequence[SampleEntry]) -> Mapping[str, PictureFile]:
    """Return the pictures of the samples that are still where the prompts name them, by checksum.

    Samples are not read if the job reads no pictures.
    """
    manifest = dataset.read_manifest()
    if all(manifest.value(f"job.{key}") is None for key in PICTURE_FIELDS.values()):
        return {}
    wanted: dict[str, set[str]] = {}
    columns: set[str] = set()
    for entry in shown:
        metadata = read_metadata(dataset, entry)
        recorded = metadata.get("pictures", {})
        columns.update(recorded)
        wanted.setdefault(metadata["prompt"], set()).update(recorded.values())
    return find_pictures(manifest.job["prompts"], [name for name in CAPTIONS if name in columns], wanted)


def load_inputs(metadata: Mapping[str, Any], available: Mapping[str, PictureFile]) -> dict[str, Image.Image]:
    """Return copies of a sample's pictures by column, without those that cannot be read any more."""
    recorded, loaded = metadata.get("pictures", {}), {}
    for name in CAPTIONS:
        if recorded.get(name) in available:
            with suppress(UserError):
                loaded[name] = read_picture(available[recorded[name]]).copy()
    return loaded
