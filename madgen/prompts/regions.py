"""The regions of a prompt line or a job: `{mask, prompt, negative_prompt}`, or `across`, prompts along the width."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from madgen.types import Box, MaskFile, Ramp, Region
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

FIELDS = ("mask", "prompt", "negative_prompt")


def parse_regions(where: object, fields: dict[str, Any], folder: Path) -> tuple[Region, ...]:
    """The regions that a line's fields ask for; mask files are relative to `folder`, or else to the current one.

    UserError names the line at fault.
    """
    regions, across = fields.get("regions") or [], fields.get("across") or []
    if regions and across:
        raise UserError(f"{where}: regions and across exclude each other; give one of them")
    if not isinstance(regions, list) or not isinstance(across, list):
        raise UserError(f"{where}: regions and across must be lists, got {regions or across!r}")
    if across:
        return _across(where, across, fields["negative_prompt"])
    if not regions:
        return ()
    return tuple(
        _region(f"{where}: region {number}", region, folder, fields["negative_prompt"])
        for number, region in enumerate(regions, 1)
    )


def region_identity(region: Region) -> tuple[Any, ...]:
    """What of a region affects pixels: a mask file's content, not its name."""
    mask = region.mask.sha256 if isinstance(region.mask, MaskFile) else region.mask
    return (region.text, region.negative, mask)


def _across(where: object, texts: list[Any], negative: str) -> tuple[Region, ...]:
    """Regions for all but the first place, which is the line's own prompt."""
    count = len(texts) + 1
    for text in texts:
        _check_text(f"{where}: a prompt of across", text)
    return tuple(Region(Ramp(index, count), text, negative) for index, text in enumerate(texts, 1))


def _region(where: str, content: Any, folder: Path, inherited: str) -> Region:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS)}, got {content!r}")
    unknown = sorted(set(content) - set(FIELDS))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    _check_text(f"{where}: the prompt", content.get("prompt"))
    negative = content.get("negative_prompt")
    negative = inherited if negative is None else negative
    if not isinstance(negative, str):
        raise UserError(f"{where}: negative_prompt must be a text, got {negative!r}")
    return Region(_mask(where, content.get("mask"), folder), content["prompt"], negative)


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{what} must be a text that is not empty, got {text!r}")


def _mask(where: str, mask: Any, folder: Path) -> Box | MaskFile:
    if isinstance(mask, list) and len(mask) == 4 and all(type(edge) is int for edge in mask):
        return Box(*mask)
    if not isinstance(mask, str) or not mask:
        raise UserError(f"{where}: mask must be [left, top, right, bottom] in pixels or a picture file, got {mask!r}")
    found = _find_mask(mask, folder)
    if found is None:
        raise UserError(f"{where}: there is no mask file {mask}, neither in {folder} nor in the current directory")
    return MaskFile(str(found), _sha256(found, found.stat().st_mtime_ns))


def _find_mask(mask: str, folder: Path) -> Path | None:
    candidates = (str(folder / mask), expand_user(mask, "mask"))
    return next((Path(path).resolve() for path in candidates if _is_picture_file(path)), None)


def _is_picture_file(path: str | Path) -> bool:
    """Return whether a path names a regular file with content; files of /proc have a size of 0, and may never end."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


def mask_names(fields: dict[str, Any]) -> list[str]:
    """The mask files that a line's fields name, as they are written there."""
    regions = fields.get("regions") or []
    masks = [region.get("mask") for region in regions if isinstance(region, dict)] if isinstance(regions, list) else []
    return [mask for mask in masks if isinstance(mask, str)]


def mask_stamp(mask: str, folder: str) -> list[Any]:
    """[name, folder, path, size, mtime in ns]: another list as soon as another file, or none, is found there."""
    found = _find_mask(mask, Path(folder))
    status = found.stat() if found is not None else None
    return [mask, folder, str(found), status and status.st_size, status and status.st_mtime_ns]


@lru_cache(maxsize=4096)
def _sha256(path: Path, changed: int) -> str:
    """Read once, unless the file was `changed` since (mtime in ns)."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the mask {path}: {error.strerror}") from error
