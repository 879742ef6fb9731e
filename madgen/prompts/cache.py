"""Plans that were read before: a table is found again by a hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from madgen.config.schema import Job
from madgen.prompts.readers._hub import is_hub
from madgen.prompts.regions import mask_names, mask_stamp
from madgen.prompts.sources import Source, find_sources
from madgen.prompts.table import FORMAT, PromptTable
from madgen.utils.errors import UserError

KEYS = (
    "source",
    "split",
    "columns",
    "negative_prompt",
    "samples_per_prompt",
    "limit",
    "on_duplicate",
    "regions",
    "across",
)


def plan_key(job: Job) -> str:
    """32 hex digits; the content of prompt files is told by their resolved paths, sizes and times alone.

    UserError where `prompts.source` names nothing.
    """
    prompts = job.as_dict()["prompts"]
    sources = find_sources(job.prompts.source, job.prompts.split, job.prompts.columns)
    content = {
        "format": FORMAT,
        "prompts": {key: prompts[key] for key in KEYS if key != "source" or is_hub(job.prompts.source)},
        "size": [job.sampling.height, job.sampling.width],
        "files": [_stamp(file) for source in sources for file in source.files()],
        "masks": [mask_stamp(mask, str(source.folder)) for mask in mask_names(prompts) for source in _folders(sources)],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_cached(cache: Path, key: str) -> PromptTable | None:
    """The table of this key; None if it is not there, not whole, or if a mask that a line names has changed."""
    try:
        table = PromptTable.open(cache / f"{key}.arrow")
    except UserError:
        return None
    now = [mask_stamp(mask, folder) for mask, folder, *_ in table.header.masks]
    return table if now == table.header.masks else None


def _folders(sources: list[Source]) -> list[Source]:
    """One source of each folder."""
    return list({source.folder: source for source in sources}.values())


def _stamp(file: Path) -> list[Any]:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"cannot read prompts.source={file}: {error.strerror}") from error
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]
