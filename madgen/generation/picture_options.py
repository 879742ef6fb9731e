"""The pictures of `madgen sample`: options that name them, and the prompt that has them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.config.schema import Job
from madgen.config.schema.init import CENTER
from madgen.generation.single_image import load_sample_job
from madgen.prompts.picture_columns import PictureColumns
from madgen.prompts.picture_files import ANYWHERE
from madgen.prompts.regions import parse_regions
from madgen.types import Prompt
from madgen.utils.errors import UserError
from madgen.utils.validation import text

COMMAND = "madgen sample"
"""Location in messages, in place of a row."""


@dataclass(frozen=True)
class PictureOptions:
    """Options of the command line; None: not set."""

    files: Mapping[str, str | None]
    """Paths or URLs by column: `image`, `mask`, `control`, `style`."""
    strength: float | None = None
    scale: float | None = None
    place: str | None = None

    def load_job(self, job_file: Path | None, overrides: Sequence[str], seed: int | None) -> Job:
        """Load the job of `madgen sample` with the settings of these options. Raises UserError."""
        settings = {"strength": self.strength, "scale": self.scale, "place": _place(self.place)}
        chosen = {name: value for name, value in settings.items() if value is not None}
        names = [f"--{name}" for name in (*chosen, *(("mask",) if self._present("mask") else ()))]
        if names and not self._present("image"):
            raise UserError(f"{names[0]} has no effect without --image; name the picture to start from")
        words = [*overrides, *(f"sampling.init.{name}={value}" for name, value in chosen.items())]
        job = load_sample_job(job_file, words, seed)
        if not self._present("image") or job.sampling.init.strength is not None:
            return job
        strength = job.sampling.init.default_strength(self._present("mask"))
        return load_sample_job(job_file, [*words, f"sampling.init.strength={strength}"], seed)

    def prompt(self, prompt: str, job: Job, overrides: Sequence[str]) -> Prompt:
        """Return the prompt with its pictures, and their size unless `overrides` set it. Raises UserError."""
        text("the prompt", prompt)
        if not prompt.strip():
            raise UserError("the prompt is empty")
        try:
            return self._prompt(prompt, job, overrides)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{COMMAND}: ")) from error

    def _prompt(self, prompt: str, job: Job, overrides: Sequence[str]) -> Prompt:
        columns = PictureColumns.of(job)
        for name, key in (("control", "backbone.controlnet.weights"), ("style", "backbone.ip_adapter.weights")):
            if self._present(name) and name not in columns.names:
                raise UserError(f"--{name} has no effect without {key}; set it")
        for name in columns.names:
            if name != "mask" and not self._present(name):
                raise UserError(f"{_REASONS[name]}: name it with --{name}")
        size = job.sampling.height, job.sampling.width
        has_size = any(word.startswith(("sampling.height=", "sampling.width=")) for word in overrides)
        pictures, left_top, size = columns.read(COMMAND, self.files, ANYWHERE, size, has_size)
        fields = {name: getattr(job.prompts, name) for name in ("regions", "across", "negative_prompt")}
        return Prompt(
            "sample", prompt, job.prompts.negative_prompt, *size,
            regions=parse_regions("prompts", fields, Path()), pictures=pictures, place=left_top,
        )  # fmt: skip

    def _present(self, name: str) -> bool:
        return self.files.get(name) is not None


_REASONS = {
    "image": "sampling.init.strength starts from a picture",
    "control": "backbone.controlnet follows a picture",
    "style": "backbone.ip_adapter follows a picture",
}


def _place(value: str | None) -> Any:
    """Return `--place` as an override: `center`, or two numbers with or without brackets."""
    if value is None or value.strip() == CENTER:
        return value and value.strip()
    numbers = value.strip().removeprefix("[").removesuffix("]").split(",")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise UserError(f"--place must be LEFT,TOP in pixels >= 0, or center, got {value!r}")
    return json.dumps([int(number) for number in numbers])
