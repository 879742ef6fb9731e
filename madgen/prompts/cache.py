"""Cached prompt tables, keyed by a hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from madgen.config.schema import Job
from madgen.prompts.picture_columns import PictureColumns
from madgen.prompts.picture_files import file_stamp
from madgen.prompts.readers._hub import is_hub
from madgen.prompts.regions import mask_names
from madgen.prompts.sources import find_sources
from madgen.prompts.table import FORMAT, PromptTable
from madgen.utils.errors import UserError


def plan_key(job: Job) -> str:
    """Return 32 hex digits; prompt files count by their resolved paths, sizes and times.

    The time of change (ctime) counts too: it cannot be set back, unlike that of the last modification.

    Raises UserError if `prompts.source` does not exist.
    """
    prompts = job.as_dict()["prompts"]
    sources = find_sources(job.prompts, PictureColumns.of(job).fields)
    ignored = {"seed", "source"}
    if is_hub(job.prompts.source):
        ignored.remove("source")
    if job.prompts.shuffle or job.prompts.samples is not None:
        ignored.remove("seed")
    local = [source.folder for source in sources if source.remote is None] or [None]
    folders = dict.fromkeys(None if folder is None else str(folder) for folder in local)
    content = {
        "format": FORMAT,
        "prompts": {key: value for key, value in prompts.items() if key not in ignored},
        "key_prefix": job.output.key_prefix,
        "size": [job.sampling.height, job.sampling.width],
        "files": [_stamp(file) for source in sources for file in source.files()],
        "remote": [[source.name, source.remote.sha256] for source in sources if source.remote is not None],
        "masks": [file_stamp(mask, folder) for mask in mask_names(prompts) for folder in folders],
    }
    if job.picture_columns:
        content["pictures"] = [job.picture_columns, asdict(job.sampling.init)]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_cached(cache: Path, key: str) -> PromptTable | None:
    """Return the table of this key; None if it is missing or damaged, or if a mask file in its rows has changed."""
    try:
        table = PromptTable.open(cache / f"{key}.arrow")
    except UserError:
        return None
    masks = [file_stamp(mask, folder) for mask, folder, *_ in table.header.masks]
    return table if masks == table.header.masks else None


def _stamp(file: Path) -> list[Any]:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"cannot read prompts.source={file}: {error.strerror}") from error
    return [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
