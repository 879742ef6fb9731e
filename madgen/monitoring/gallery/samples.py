"""Read the samples of a dataset one by one, those in open shards included."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import IMAGE_FORMATS, read_members
from madgen.dataset.shards.open_samples import open_samples
from madgen.types import shard_index
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A sample: its JSON, the bytes of its image and their file suffix."""

    entry: SampleEntry
    metadata: dict[str, Any]
    picture: bytes
    suffix: str

    def decoded(self, box: tuple[int, int]) -> Image.Image:
        """Decode the image as RGB, downscaled to fit a box of (width, height) pixels."""
        try:
            with Image.open(io.BytesIO(self.picture)) as image:
                image.thumbnail(box, Image.Resampling.LANCZOS)
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"the image of {self.entry.key} in {self.entry.shard} is unreadable: {error}") from None


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
    shard = dataset.tar(entry.shard)
    try:
        members = read_members(dataset, entry)
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror or error}") from None
    suffix = next((suffix for suffix in IMAGE_FORMATS if suffix in members), None)
    if suffix is None or "json" not in members:
        raise UserError(f"{shard} is damaged: sample {entry.key} (byte {entry.offset}) has no image or no JSON")
    return Sample(entry, _object(members["json"], f"{entry.key}.json in {shard}"), members[suffix], suffix)


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value
