"""Overrides of the command line, such as `method.merge.operator=swap`, for callers from Python."""

from __future__ import annotations

from collections.abc import Sequence

from madgen.config.loader import build_job, load_origins
from madgen.config.schema import Job
from madgen.utils.errors import UserError
from madgen.utils.validation import texts

SECTIONS = ("backbone", "method", "sampling")
"""Sections that apply to a sampler."""


def overridden(job: Job, overrides: Sequence[str]) -> tuple[Job, frozenset[str]]:
    """Apply `key=value` overrides to the sections of a job that apply to a sampler; return it and the keys they set.

    Raises UserError with the messages of the command line.
    """
    overrides = texts("overrides", overrides)
    keys = load_origins([], overrides)
    for key in reversed(keys):  # sections precede their keys
        if key.partition(".")[0] not in SECTIONS and hasattr(job, key.partition(".")[0]):
            raise UserError(f"overrides may set keys of {', '.join(SECTIONS)}, got {key}; see load_job for other keys")
    if "sampling.batch_size" in keys:
        raise UserError("sampling.batch_size has no effect in Python: all prompts of a call are sampled together")
    return build_job([], job.name, (), overrides, job), frozenset(keys)
