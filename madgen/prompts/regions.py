"""Regions of a row or a job: parse, record, identify. `{mask, prompt, negative_prompt}`, or `across` for a blend."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from madgen.images.masks import MAX_STRETCH
from madgen.prompts.picture_files import file_sha256, find_file
from madgen.types import Box, MaskFile, MaskPicture, Ramp, Region
from madgen.utils.errors import UserError
from madgen.utils.validation import nearest

FIELDS = ("mask", "prompt", "negative_prompt")


@dataclass(frozen=True)
class RecordedRegions:
    """The regions of a finished panorama, which apply at any size of the same aspect ratio."""

    regions: tuple[Region, ...]
    height: int
    """Pixels, as `width`, that boxes refer to."""
    width: int

    @classmethod
    def parse(cls, where: object, metadata: dict[str, Any]) -> RecordedRegions | None:
        """Read `regions` of a sample's JSON; None if it has none. Raises UserError if they are damaged."""
        if not metadata.get("regions"):
            return None
        try:
            regions = tuple(Region.from_dict(region) for region in metadata["regions"])
            parsed = cls(regions, int(metadata["height"]), int(metadata["width"]))
            valid = min(parsed.height, parsed.width) > 0 and all(map(_is_recorded, regions))
        except (LookupError, TypeError, ValueError, AttributeError):
            valid = False
        if not valid:
            raise UserError(f"{where}: the regions in its JSON are damaged; leave them out with prompts.columns")
        return parsed

    def at(self, where: object, height: int, width: int, placed: bool) -> tuple[Region, ...]:
        """Return the regions of a panorama of another size. Raises UserError if they do not match it."""
        if placed or abs(width * self.height / (height * self.width) - 1) > MAX_STRETCH:
            raise UserError(
                f"{where}: its regions are those of {self.height}x{self.width} px, and cannot be carried over to a "
                f"panorama of {height}x{width} px; leave them out with prompts.columns={{prompt: prompt, seed: seed}}"
            )
        return tuple(replace(region, mask=self._scaled(region.mask, height, width)) for region in self.regions)

    def _scaled(self, mask: Any, height: int, width: int) -> Any:
        if not isinstance(mask, Box):
            return mask
        x, y = width / self.width, height / self.height
        return Box(round(mask.left * x), round(mask.top * y), round(mask.right * x), round(mask.bottom * y))


def _is_recorded(region: Region) -> bool:
    """Return whether a region is complete, and does not name a file."""
    kind = str if isinstance(region.mask, MaskPicture) else int
    if isinstance(region.mask, MaskFile) or not all(type(value) is kind for value in astuple(region.mask)):
        return False
    return isinstance(region.text, str) and isinstance(region.negative, str) and region.text.strip() != ""


def parse_regions(
    where: object, fields: dict[str, Any], folder: Path | None, confined: bool = False
) -> tuple[Region, ...]:
    """Parse the fields `regions` and `across`; mask files are relative to `folder`, or else to the current directory.

    `where` is the location for UserErrors. If `confined`, mask files must be inside `folder`, links resolved, or there
    are none if it is None: a prompt file from elsewhere could otherwise publish any picture of this machine.
    """
    regions, across = fields.get("regions") or [], fields.get("across") or []
    if regions and across:
        raise UserError(f"{where}: regions and across exclude each other; remove one of them")
    if not isinstance(regions, list) or not isinstance(across, list):
        raise UserError(f"{where}: regions and across must be lists, got {regions or across!r}")
    if across:
        return _across(where, across, fields["negative_prompt"])
    if not regions:
        return ()
    return tuple(
        _region(f"{where}: region {number}", region, folder, fields["negative_prompt"], confined)
        for number, region in enumerate(regions, 1)
    )


def region_identity(region: Region) -> tuple[Any, ...]:
    """Return what affects pixels: the content of a mask file counts, its path does not."""
    mask = region.mask.sha256 if isinstance(region.mask, MaskFile) else region.mask
    return (region.text, region.negative, mask)


def _across(where: object, texts: list[Any], negative: str) -> tuple[Region, ...]:
    """Return ramps for all positions but the first, which is the row's own prompt."""
    count = len(texts) + 1
    for text in texts:
        _check_text(f"{where}: each prompt of across", text)
    return tuple(Region(Ramp(index, count), text, negative) for index, text in enumerate(texts, 1))


def _region(where: str, content: Any, folder: Path | None, inherited: str, confined: bool) -> Region:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS)}, got {content!r}")
    unknown = sorted(set(content) - set(FIELDS))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}{nearest(str(unknown[0]), FIELDS)}")
    _check_text(f"{where}: the prompt", content.get("prompt"))
    negative = content.get("negative_prompt")
    negative = inherited if negative is None else negative
    if not isinstance(negative, str):
        raise UserError(f"{where}: negative_prompt must be a string, got {negative!r}")
    return Region(_mask(where, content.get("mask"), folder, confined), content["prompt"], negative)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name} must be a non-empty string, got {text!r}")


def _mask(where: str, mask: Any, folder: Path | None, confined: bool) -> Box | MaskFile:
    if isinstance(mask, list) and len(mask) == 4 and all(type(edge) is int for edge in mask):
        return Box(*mask)
    if not isinstance(mask, str) or not mask:
        raise UserError(f"{where}: mask must be [left, top, right, bottom] in pixels or an image file, got {mask!r}")
    path = find_file(where, "mask", mask, folder, confined)
    return MaskFile(str(path), file_sha256("mask", path))


def mask_names(fields: dict[str, Any]) -> list[str]:
    """Return the mask files in the field `regions`, as written there."""
    regions = fields.get("regions") or []
    masks = [region.get("mask") for region in regions if isinstance(region, dict)] if isinstance(regions, list) else []
    return [mask for mask in masks if isinstance(mask, str)]
