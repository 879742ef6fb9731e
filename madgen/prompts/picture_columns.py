"""Pictures that rows name: the one to start from (`image`), what is kept of it (`mask`), where it lies (`place`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from madgen.config.schema import PICTURE_FIELDS, PROMPT_FIELDS, InitConfig, Job
from madgen.config.schema.init import check_place
from madgen.images.decoding import read_mask
from madgen.images.placement import Size, check_aspect, check_mask, locate, scaled_size
from madgen.prompts.picture_files import Access, parse_picture
from madgen.types import PictureFile
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class PictureColumns:
    """The columns of rows that name pictures in this job."""

    names: tuple[str, ...] = ()
    """`image` and `mask` in jobs that start from pictures, `control` with a ControlNet, `style` with an IP-Adapter."""
    init: InitConfig = field(default_factory=InitConfig)

    @classmethod
    def of(cls, job: Job) -> PictureColumns:
        """Return the columns of a job. Raises UserError for settings of pictures that it or its backbone cannot use."""
        job.backbone.check_adapters_of_family()
        job.sampling.init.check_used()
        return cls(job.picture_columns, job.sampling.init)

    @property
    def fields(self) -> tuple[str, ...]:
        """Return all fields of a row."""
        return (*PROMPT_FIELDS, *self.names, *(("place",) if "image" in self.names else ()))

    def read(
        self, where: object, fields: Mapping[str, Any], access: Access, size: Size, has_size: bool
    ) -> tuple[dict[str, PictureFile], Size | None, Size]:
        """Return a row's pictures, the left and top pixel of its image on the panorama, and the panorama's size.

        `size` is the row's own one, or else the job's, which an image replaces if it has no place. Raises UserError.
        """
        pictures = self._parse(where, fields, access)
        if "image" not in pictures:
            return pictures, None, size
        place = self._place(where, fields.get("place"))
        picture = scaled_size((pictures["image"].height, pictures["image"].width), self.init.scale)
        if place is None and not has_size:
            size = picture
        elif place is None:
            self._check_size(where, picture, size)
        return pictures, self._left_top(where, pictures, place, picture, size), size

    def _parse(self, where: object, fields: Mapping[str, Any], access: Access) -> dict[str, PictureFile]:
        """Parse a row's pictures, see `parse_picture`. Raises UserError for a row without a required one."""
        names = {name: fields.get(name) for name in self.names}
        present = {name: value for name, value in names.items() if not _is_blank(value)}
        if "image" in names and "image" not in present:
            raise UserError(
                f"{where}: no image; sampling.init.strength={self.init.strength:g} starts from a picture of each row: "
                "name it in the column image, or set the strength to null"
            )
        for column, adapter in (("control", "a ControlNet"), ("style", "an IP-Adapter")):
            if column in names and column not in present:
                raise UserError(
                    f"{where}: no {column} picture; {adapter} follows a picture of each row: name it in the column "
                    f"{column}, or set {PICTURE_FIELDS[column]} to null"
                )
        return {name: parse_picture(where, name, value, access) for name, value in present.items()}

    def _place(self, where: object, value: Any) -> Any:
        """Parse the field `place`: `center`, [left, top], or None."""
        value = self.init.place if _is_blank(value) else value
        if isinstance(value, str) and value.strip().startswith("["):  # in CSV
            with suppress(ValueError):  # an error below
                value = json.loads(value)
        check_place(f"{where}: place", value)
        return value

    def _check_size(self, where: object, picture: Size, size: Size) -> None:
        """Raise UserError if a row's own size does not match that of its enlarged image, the whole panorama."""
        if self.init.scale != 1:
            raise UserError(
                f"{where}: the row's size and sampling.init.scale={self.init.scale:g} exclude each other; remove one"
            )
        _located(where, check_aspect, picture, size)

    def _left_top(
        self, where: object, pictures: Mapping[str, PictureFile], place: Any, picture: Size, size: Size
    ) -> Size | None:
        """Return the left and top pixel of the enlarged `picture` on a panorama; None: it is the whole panorama.

        Raises UserError if it does not lie inside, if nothing is left to generate, or if the mask does not match.
        """
        image, mask = pictures["image"], pictures.get("mask")
        if mask is not None:
            _located(where, check_mask, read_mask(mask), (image.height, image.width))
        if self.init.strength == 0 and (mask is not None or place is not None):
            raise UserError(f"{where}: sampling.init.strength=0 generates nothing around what is kept; raise it")
        if place is None:
            return None
        left_top: Size = _located(where, locate, place, picture, size)
        if picture == size and mask is None:
            raise UserError(f"{where}: the image covers the whole panorama, so place has no effect; remove it")
        return left_top


def _located(where: object, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function; its UserErrors begin with the location of the row."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_known(where: object, name: str, known: tuple[str, ...]) -> None:
    """Raise UserError if `name` is not one of the `known` fields of rows."""
    if name in known:
        return
    if name in PICTURE_FIELDS:
        raise UserError(
            f"{where}: the field {name!r} has no effect without {PICTURE_FIELDS[name]}; set it, or keep the field "
            "with prompts.keep_columns"
        )
    raise UserError(
        f"{where}: unknown field {name!r}; known: {', '.join(known)}; select the fields to read with "
        "prompts.columns, or keep others with prompts.keep_columns"
    )


def _is_blank(value: Any) -> bool:
    """Return whether a field is not set: null, NaN, or an empty cell."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
