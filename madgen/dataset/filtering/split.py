"""Split a dataset into parts, such as one for training and one for validation, by a hash of prompts or samples.

A sample's part depends on its prompt's id (or its key) and on the shares alone: a dataset that has grown is split like
before, and the new samples are added to the parts.
"""

from __future__ import annotations

import logging
import re
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from madgen.dataset.filtering.filter import (
    assign,
    reading_shards,
    selected_manifest,
    warn_if_unfinished,
    write_selection,
)
from madgen.dataset.format import Manifest, SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.new_directory import new_directory
from madgen.utils.atomic import check_new_directory
from madgen.utils.console import plural
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)

UNITS = ("prompt", "sample")
"""What is assigned to a part as a whole."""
Shares = dict[str, float]


def parse_shares(text: str) -> Shares:
    """Parse `train=0.9,val=0.1`. Raises UserError."""
    shares: Shares = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if not value or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            raise UserError(f"--shares: {item.strip()!r} is not NAME=SHARE, such as train=0.9 with letters and digits")
        if name in shares:
            raise UserError(f"--shares names {name!r} twice")
        try:
            shares[name] = float(value)
        except ValueError:
            raise UserError(f"--shares: {name}={value!r} is not a number, such as {name}=0.1") from None
        if not 0 < shares[name] <= 1:
            raise UserError(f"--shares: {name}={value} must be > 0 and <= 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"--shares={text} add up to {total:g}, and must add up to 1")
    return shares


def split_dataset(source: DatasetDir, shares: Shares, by: str, target: Path) -> None:
    """Write the parts to folders of `target`, all or none of them, and print their numbers of samples."""
    if by not in UNITS:
        raise UserError(f"--by must be one of {', '.join(UNITS)}, got {by!r}")
    manifest = source.read_manifest()
    check_new_directory(target)
    with reading_shards():
        assigned, seen = assign(source.entries(), lambda entry: part_of(_unit(manifest, entry, by), shares))
        if not seen.samples:
            raise UserError(f"{source.root} has no finished sample yet")
        parts = {name: assigned.get(name, {}) for name in shares}
        with new_directory(target) as temporary:
            for name, kept in parts.items():
                split = {"shares": [list(item) for item in shares.items()], "by": by, "part": name}
                selection = {"where": None, "best": None, "by": None, "split": split}
                content = selected_manifest(source, manifest, selection, kept, seen)
                write_selection(source, kept, DatasetDir(temporary / name), content)
    warn_if_unfinished(source, seen.samples, manifest)
    for name, kept in parts.items():
        count = sum(map(len, kept.values()))
        if not count:
            logger.warning("%s is empty: no %s has a hash in its share of %g", target / name, by, shares[name])
        print(f"{target / name}: {count} of {plural(seen.samples, 'sample')}")


def _unit(manifest: Manifest, entry: SampleEntry, by: str) -> str:
    """Return what decides about a sample, independently of `output.key_prefix`."""
    prompt_id = manifest.prompt_id(entry.key)
    return prompt_id if by == "prompt" else f"{prompt_id}-{entry.sample_index:04d}"


def part_of(unit: str, shares: Shares) -> str:
    """Return the part of a prompt or sample: its hash, as a number in 0..1, falls into the range of one share."""
    position = int.from_bytes(blake2b(unit.encode(), digest_size=8).digest()) / 2**64
    ends = zip(shares, accumulate(shares.values()), strict=True)
    return next((name for name, end in ends if position < end), list(shares)[-1])
