"""Find the pictures that samples started from or followed, if they are still where the prompts name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from madgen.config.schema import PICTURE_FIELDS
from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_metadata
from madgen.images.decoding import read_picture
from madgen.prompts.recorded_pictures import find_pictures
from madgen.types import PictureFile
from madgen.utils.errors import UserError

CAPTIONS = {"image": "Started from", "mask": "Kept (white)", "control": "Control picture", "style": "Style picture"}
"""Captions of pictures by column, in the order in which they are shown."""


def find_inputs(dataset: DatasetDir, shown: Sequence[SampleEntry]) -> Mapping[str, PictureFile]:
    """Return the available pictures of the samples by checksum; none if the job reads no pictures."""
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
