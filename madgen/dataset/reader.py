"""Read samples of finished shards, by the offsets in the sidecars."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError

IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass(frozen=True)
class Sample:
    """A sample of a dataset."""

    metadata: dict[str, Any]
    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    format: str


def read_sample(directory: DatasetDir, key: str) -> Sample:
    """Read a sample of a finished shard by its key. Raises UserError if there is none."""
    directory.read_manifest()
    for entry in directory.entries():
        if entry.key == key:
            return read_entry(directory, entry)
    raise UserError(f"{directory.root} has no finished sample {key!r}")


def read_entry(directory: DatasetDir, entry: SampleEntry) -> Sample:
    """Read a sample and decode its image."""
    members = read_members(directory, entry)
    image_format = next(name for name in IMAGE_FORMATS if name in members)
    with Image.open(io.BytesIO(members[image_format])) as image:
        return Sample(json.loads(members["json"]), np.asarray(image.convert("RGB")), image_format)


def read_metadata(directory: DatasetDir, entry: SampleEntry) -> dict[str, Any]:
    """Read the JSON of a sample without decoding its image."""
    return json.loads(read_members(directory, entry)["json"])


def read_members(directory: DatasetDir, entry: SampleEntry) -> dict[str, bytes]:
    """Read the files of a sample, by suffix. Raises UserError if its checksum does not match."""
    with open(directory.tar(entry.shard), "rb") as stream:
        stream.seek(entry.offset)
        records = stream.read(entry.size)
    if hashlib.sha256(records).hexdigest() != entry.sha256:
        raise UserError(
            f"{directory.tar(entry.shard)} is damaged: checksum mismatch of sample {entry.key} (byte {entry.offset}); "
            f"run madgen verify {directory.root} --repair, then generate again to remake it"
        )
    with tarfile.open(fileobj=io.BytesIO(records), mode="r:") as tar:
        return {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
