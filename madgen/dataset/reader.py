"""Read samples, by the offsets in the sidecars and in the journals of open shards."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from madgen.dataset.checks.tar import READ_ERRORS
from madgen.dataset.encoding import decode_members
from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import open_file, parse_object
from madgen.dataset.shards import journal
from madgen.dataset.shards.journal import open_samples
from madgen.images.decoding import DAMAGED
from madgen.utils.errors import UserError

IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass(frozen=True)
class Sample:
    """A sample of a dataset."""

    directory: DatasetDir
    entry: SampleEntry
    metadata: dict[str, Any]
    image: bytes
    """The image as it is stored."""
    format: str

    @cached_property
    def image_HWC(self) -> np.ndarray:
        """Decode the image, uint8 [H, W, 3]. Raises UserError if it is damaged."""
        try:
            with Image.open(io.BytesIO(self.image)) as image:
                return np.asarray(image.convert("RGB"))
        except DAMAGED as error:
            raise damaged_sample(self.directory, self.entry, f"undecodable image ({error})") from error


def read_sample(directory: DatasetDir, key: str) -> Sample:
    """Read a sample of a finished or open shard by its key. Raises UserError if there is none."""
    directory.read_manifest()
    for entry in itertools.chain(directory.entries(), open_samples(directory)):
        if entry.key == key:
            return read_entry(directory, entry)
    raise UserError(f"{directory.root} has no sample {key!r}")


def read_entry(directory: DatasetDir, entry: SampleEntry) -> Sample:
    """Read a sample. Raises UserError if it is damaged; its image is not decoded yet."""
    members = read_members(directory, entry)
    image_format = next((name for name in IMAGE_FORMATS if name in members), None)
    if image_format is None or "json" not in members:
        raise damaged_sample(directory, entry, "no image or no JSON")
    metadata = parse_object(members["json"], f"the JSON of {entry.key}")
    return Sample(directory, entry, metadata, members[image_format], image_format)


def read_metadata(directory: DatasetDir, entry: SampleEntry) -> dict[str, Any]:
    """Read the JSON of a sample without decoding its image. Raises UserError if it is damaged."""
    return parse_object(read_members(directory, entry).get("json", b""), f"the JSON of {entry.key}")


def read_members(directory: DatasetDir, entry: SampleEntry) -> dict[str, bytes]:
    """Read the files of a sample, by suffix. Raises UserError if it is damaged."""
    records = read_records(directory, entry)
    try:
        return decode_members(records, entry.key)
    except READ_ERRORS as error:
        raise damaged_sample(directory, entry, str(error)) from error


def read_records(directory: DatasetDir, entry: SampleEntry) -> bytes:
    """Read the tar records of a sample. Raises UserError if its checksum does not match."""
    still_open = entry.open_tar is not None and entry.open_tar.exists()  # else published since it was listed
    with open_file(entry.open_tar if still_open and entry.open_tar else directory.tar(entry.shard)) as stream:
        records = journal.read_records(stream, entry)
    if records is None:
        raise damaged_sample(directory, entry, "checksum mismatch")
    return records


def damaged_sample(directory: DatasetDir, entry: SampleEntry, problem: str) -> UserError:
    """Return the error of a sample whose tar is damaged."""
    return UserError(
        f"{directory.tar(entry.shard)} is damaged: {problem} of sample {entry.key} (byte {entry.offset}); "
        f"run madgen verify {directory.root} --repair, then generate again"
    )
