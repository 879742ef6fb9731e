"""Job, file names and progress bar of commands that write single images. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from madgen.config.loader import UnknownPresetError, load_job
from madgen.config.schema import Job
from madgen.utils.errors import UserError
from madgen.utils.resources import resource

if TYPE_CHECKING:
    from madgen.diffusion.denoise import OnStep

FORMATS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
DEMO = "backbone/demo.yaml"


def load_sample_job(job_file: Path | None, words: Sequence[str], seed: int | None) -> Job:
    """Load the job of `madgen sample`; without a job file, the demo backbone with MAD. `seed` is `prompts.seed`.

    `words` are presets or job files, merged in order, and overrides.
    """
    files: list[str | Path] = [job_file or resource("configs") / DEMO, *(word for word in words if "=" not in word)]
    overrides = [word for word in words if "=" in word]
    try:
        return load_job(files, overrides if seed is None else [*overrides, f"prompts.seed={seed}"])
    except UnknownPresetError as error:
        raise UserError(f"{error}; put a prompt of several words into quotes") from error


def numbered(output: Path, num: int) -> list[Path]:
    """Return the files of `num` panoramas: `output`, or `output` with -1, -2, ... before its suffix."""
    if num == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, num + 1)]


def check_output(output: Path) -> str:
    """Return the image format of a file name. Raises UserError if the file cannot be written."""
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"-o {output} must end in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise UserError(f"-o {output}: the folder {output.parent} does not exist")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"-o {output} cannot be written; choose another path")
    return FORMATS[output.suffix.lower()]


@contextmanager
def step_bar(steps: int) -> Iterator[OnStep]:
    """Show the denoising steps on stderr; yield the callback `on_step`."""
    from madgen.utils.progress import showing_progress

    with showing_progress("sampling", "steps") as show:

        def advance(step, timestep, latents_BCHW):  # type: ignore[no-untyped-def]
            show(step + 1, steps)
            return latents_BCHW

        yield advance
