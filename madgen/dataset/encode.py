"""Records to bytes. Nothing that depends on when, where or by whom a panorama was made goes in."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from madgen.dataset.layout import to_json
from madgen.types import Record


def encode_image(image_HWC: np.ndarray, image_format: str, quality: int, loop: bool = False) -> bytes:
    """PNG (lossless), JPEG without chroma subsampling, or WebP; `quality` 1..100 for the latter two.

    A panorama that closes (`loop`) says so to viewers, in GPano metadata.
    """
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG", "compress_level": 6},
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": 0, "optimize": True},
        "webp": {"format": "WEBP", "quality": quality, "method": 4},
    }
    chosen, stream = options[image_format], io.BytesIO()
    if loop:
        xmp = gpano(*image_HWC.shape[:2])
        chosen |= {"pnginfo": _png_info(xmp)} if image_format == "png" else {"xmp": xmp.encode()}
    Image.fromarray(image_HWC).save(stream, **chosen)
    return stream.getvalue()


def gpano(height: int, width: int) -> str:
    """XMP that says: these pixels go once around, on a cylinder.

    Not `equirectangular`: the rows of a sampled panorama are not angles, and a viewer would bend them.
    """
    fields = {
        "ProjectionType": "cylindrical",
        "FullPanoWidthPixels": width,
        "FullPanoHeightPixels": height,
        "CroppedAreaImageWidthPixels": width,
        "CroppedAreaImageHeightPixels": height,
        "CroppedAreaLeftPixels": 0,
        "CroppedAreaTopPixels": 0,
    }
    attributes = " ".join(f'GPano:{name}="{value}"' for name, value in fields.items())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" {attributes}/>'
        "</rdf:RDF></x:xmpmeta>"
    )


def _png_info(xmp: str) -> PngInfo:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    return info


def encode_record(record: Record, image_format: str, quality: int) -> dict[str, Any]:
    """A WebDataset sample: `<key>.png`, `<key>.json`, `<key>.txt`."""
    loop = bool(record.metadata.get("sampling", {}).get("loop"))
    return {
        "__key__": record.task.key,
        image_format: encode_image(record.image_HWC, image_format, quality, loop),
        "json": to_json(record.metadata),
        "txt": record.task.prompt.text.encode(),
    }
