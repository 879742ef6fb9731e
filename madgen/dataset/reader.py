"""One finished sample by its key, found through the sidecars."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError

IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass(frozen=True)
class Sample:
    """What a dataset holds under one key."""

    metadata: dict[str, Any]
    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    format: str


def read_sample(directory: DatasetDir, key: str) -> Sample:
    """Reads only the sample's own bytes; UserError if no finished shard holds the key."""
    directory.read_manifest()
    for sidecar in directory.sidecars():
        for entry in sidecar["samples"]:
            if entry["key"] == key:
                return read_entry(directory, sidecar["shard"], entry)
    raise UserError(f"{directory.root} has no finished sample {key!r}")


def read_entry(directory: DatasetDir, shard: str, entry: dict[str, Any]) -> Sample:
    """The sample that an entry of a shard's sidecar tells of."""
    return _parse(_records(directory, shard, entry))


def read_metadata(directory: DatasetDir, shard: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a sample, without looking at its picture."""
    return json.loads(_members(_records(directory, shard, entry))["json"])


def _records(directory: DatasetDir, shard: str, entry: dict[str, Any]) -> bytes:
    with open(directory.tar(shard), "rb") as stream:
        stream.seek(entry["offset"])
        records = stream.read(entry["size"])
    if hashlib.sha256(records).hexdigest() != entry["sha256"]:
        raise UserError(
            f"{directory.tar(shard)}: sample {entry['key']} is not what was written; "
            f"madgen verify {directory.root} --repair has it made again"
        )
    return records


def _members(records: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(records)) as tar:
        return {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def _parse(records: bytes) -> Sample:
    members = _members(records)
    image_format = next(name for name in IMAGE_FORMATS if name in members)
    with Image.open(io.BytesIO(members[image_format])) as image:
        return Sample(json.loads(members["json"]), np.asarray(image.convert("RGB")), image_format)
