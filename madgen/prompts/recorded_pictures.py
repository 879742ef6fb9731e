"""Find the pictures of finished samples again, which record their checksums alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

from madgen.config.schema import PromptsConfig
from madgen.prompts.picture_columns import PictureColumns
from madgen.prompts.picture_files import Access, parse_picture
from madgen.prompts.sources import find_sources
from madgen.types import PictureFile
from madgen.utils.errors import UserError


def find_pictures(
    prompts: Mapping[str, Any], columns: Sequence[str], wanted: Mapping[str, AbstractSet[str]]
) -> dict[str, PictureFile]:
    """Search the prompts of a job for pictures; return those that are still there, by checksum.

    `prompts` is that part of the job in `dataset.json`, `columns` are the columns that name pictures, and `wanted` has
    the checksums by the text of the prompt.
    """
    left = {checksum for checksums in wanted.values() for checksum in checksums}
    pictures: dict[str, PictureFile] = {}
    with suppress(UserError, OSError):  # the prompt file may be gone
        for access, row in _rows(prompts, columns):
            for column in columns if row.get("prompt") in wanted else ():
                with suppress(UserError):
                    picture = parse_picture("", column, row.get(column), access)
                    if picture.sha256 in left:
                        pictures[picture.sha256] = picture
            if len(pictures) == len(left):
                break
    return pictures


def _rows(prompts: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[Access, dict[str, Any]]]:
    config = PromptsConfig(**prompts)
    for source in find_sources(config, PictureColumns(tuple(columns)).fields):
        access = source.access(config, confined=False)
        for chunk in source.read():
            yield from ((access, row) for row in chunk.rows if isinstance(row, dict))
