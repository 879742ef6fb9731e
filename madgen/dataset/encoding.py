"""Encode records as bytes, independently of times, hosts and workers."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from madgen.dataset.format import to_json
from madgen.images import embedded_metadata as embed
from madgen.types import Record
from madgen.utils.errors import UserError

LONGEST_SIDE = {"png": 2**31 - 1, "jpg": 65_500, "webp": 16_383}
"""Maximum side in pixels that the encoder of a format supports."""


def check_side(image_format: str, height: int, width: int) -> None:
    """Raise UserError if an image is too large for its format."""
    max_side = LONGEST_SIDE[image_format]
    if max(height, width) > max_side:
        raise UserError(
            f"{height}x{width} px: {image_format} supports at most {max_side} px a side; use another output.format"
        )


def encode_image(
    image_HWC: np.ndarray,
    image_format: str,
    quality: int,
    loop: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Encode a uint8 image [H, W, 3] as PNG (lossless), JPEG without chroma subsampling, or WebP.

    `quality` (1..100) applies to JPEG and WebP. A sample's JSON (`metadata`) and, for closed panoramas (`loop`), GPano
    fields are embedded in the file, see `embedded_metadata`.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG", "compress_level": 6},
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": 0},
        "webp": {"format": "WEBP", "quality": quality, "method": 4},
    }
    arguments, stream = options[image_format], io.BytesIO()
    fields = embed.gpano(*image_HWC.shape[:2]) if loop else None
    if image_format == "png":
        arguments["pnginfo"] = info = PngInfo()
        if metadata is not None:
            info.add_text("parameters", embed.parameters(metadata))
            info.add_itxt("Description", embed.description(metadata))
        if loop:
            info.add_itxt("XML:com.adobe.xmp", embed.xmp(None, fields).decode())
    elif metadata is not None or loop:
        arguments["xmp"] = embed.xmp(metadata, fields)
    Image.fromarray(image_HWC).save(stream, **arguments)
    return stream.getvalue()


def encode_sample(record: Record, image_format: str, quality: int) -> bytes:
    """Return the tar records of a WebDataset sample (`<key>.json`, `<key>.png`, `<key>.txt`) with headers and padding.

    A shard is the concatenation of its samples' bytes, followed by the zeros that end a tar.
    """
    loop = bool(record.metadata.get("sampling", {}).get("loop"))
    image = encode_image(record.image_HWC, image_format, quality, loop, record.metadata)
    text = record.task.prompt.text.encode()
    return encode_members(record.task.key, {image_format: image, "json": to_json(record.metadata), "txt": text})


def encode_members(key: str, members: Mapping[str, bytes]) -> bytes:
    """Return the tar records of the files of a sample, by their extension."""
    import webdataset  # which imports torch

    stream = io.BytesIO()
    writer = webdataset.TarWriter(stream, encoder=False, mtime=0, user="madgen", group="madgen", format="PAX_FORMAT")
    writer.write({"__key__": key, **members})
    size = writer.tarstream.offset
    writer.close()
    return stream.getvalue()[:size]


def decode_members(records: bytes, key: str) -> dict[str, bytes]:
    """Invert `encode_members`. Raises one of `READ_ERRORS`, such as LookupError for files of another sample."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(records), mode="r:") as tar:
        for member in tar:
            name, _, extension = member.name.partition(".")
            if name != key:
                raise LookupError(f"{member.name} is not a file of {key}")
            if (content := tar.extractfile(member)) is not None:
                members[extension] = content.read()
    return members
