"""Reading the finished samples of a dataset one by one, from their places in the tars."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import IMAGE_FORMATS
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Place:
    """What a sidecar says of a sample: `size` bytes of tar records from byte `offset` of the tar file `shard`."""

    shard: Path
    key: str
    offset: int
    size: int
    prompt: str
    height: int
    width: int
    """Pixels, as `height`."""
    scores: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One sample as read: its JSON, and the bytes and the suffix of its picture."""

    place: Place
    metadata: dict[str, Any]
    picture: bytes
    suffix: str

    def decoded(self, box: tuple[int, int]) -> Image.Image:
        """The picture as RGB, made to fit a box of (width, height) pixels; a smaller one stays as it is."""
        try:
            with Image.open(io.BytesIO(self.picture)) as image:
                image.thumbnail(box, Image.Resampling.LANCZOS)
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"the picture of {self.place.key} in {self.place.shard} is unreadable: {error}") from None


def places(dataset: DatasetDir) -> list[Place]:
    """Every sample of the finished shards, in the order of the shards' names; UserError if there is none."""
    found = [place for name in sorted(dataset.done()) for place in _listed(dataset, name)]
    if not found:
        raise UserError(f"{dataset.root} has no finished sample yet; the first shard is still to be completed")
    return found


def _listed(dataset: DatasetDir, name: str) -> Iterator[Place]:
    try:
        for entry in dataset.read_sidecar(name)["samples"]:
            yield Place(
                shard=dataset.tar(name),
                key=str(entry["key"]),
                offset=int(entry["offset"]),
                size=int(entry["size"]),
                prompt=str(entry["prompt"]),
                height=int(entry["height"]),
                width=int(entry["width"]),
                scores=_finite(entry.get("scores", {})),
            )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{dataset.sidecar(name)} is no list of samples, each with its key, prompt, place and size"
        ) from None


def _finite(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are numbers: JSON for a browser knows no NaN."""
    return {name: float(value) for name, value in scores.items() if value is not None and math.isfinite(value)}


def spread(found: list[Place], limit: int | None) -> list[Place]:
    """At most `limit` places, evenly spaced, the first and the last among them."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} shows nothing; it must be at least 1")
    if limit is None or limit >= len(found):
        return found
    return [found[index * (len(found) - 1) // max(limit - 1, 1)] for index in range(limit)]


def read(place: Place) -> Sample:
    """The sample at this place, its members in any order. UserError names a shard that is damaged."""
    try:
        with place.shard.open("rb") as file:
            file.seek(place.offset)
            members = _members(place.key, file.read(place.size))
    except OSError as error:
        raise UserError(f"{place.shard} cannot be read: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise UserError(f"{place.shard} is damaged at sample {place.key} (byte {place.offset}): {error}") from None
    suffix = next((suffix for suffix in IMAGE_FORMATS if suffix in members), None)
    if suffix is None or "json" not in members:
        raise UserError(f"{place.shard} is damaged: no picture with its JSON for {place.key} at byte {place.offset}")
    return Sample(place, _object(members["json"], f"{place.key}.json in {place.shard}"), members[suffix], suffix)


def _members(key: str, records: bytes) -> dict[str, bytes]:
    """The contents by what follows the key in their names."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(records), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and member.name.startswith(f"{key}."):
                members[member.name[len(key) + 1 :]] = content.read()
    return members


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value
