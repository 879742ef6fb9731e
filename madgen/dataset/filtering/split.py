"""Split a dataset into parts, such as one for training and one for validation, by a hash of prompts or samples.

A sample's part depends on its prompt's id (or its key) and on the shares alone: a dataset that has grown is split like
before, and the new samples are added to the parts.
"""

from __future__ import annotations

import logging
import re
from hashlib import blake2b, sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from madgen.dataset.filtering.filter import selected_manifest, write_selection
from madgen.dataset.filtering.selection import Seen
from madgen.dataset.format import Manifest, SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.new_directory import new_directory
from madgen.dataset.shards.copying import Kept
from madgen.utils.atomic import check_new_directory
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
    try:
        parts, seen = _assign(source, manifest, shares, by)
        with new_directory(target) as temporary:
            for name, kept in parts.items():
                selection = {"where": None, "best": None, "by": None, "split": _description(shares, by, name)}
                content = selected_manifest(source, manifest, selection, kept, seen)
                write_selection(source, kept, DatasetDir(temporary / name), content)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} has disappeared; retry when generate has finished") from error
    if seen.samples < manifest.plan.samples:
        logger.warning(
            "%s has %d of %d samples now; the others were left out", source.root, seen.samples, manifest.plan.samples
        )
    for name, kept in parts.items():
        count = sum(map(len, kept.values()))
        if not count:
            logger.warning("%s is empty: no %s has a hash in its share of %g", target / name, by, shares[name])
        print(f"{target / name}: {count} of {seen.samples} samples")


def _description(shares: Shares, by: str, name: str) -> dict[str, Any]:
    return {"shares": [list(item) for item in shares.items()], "by": by, "part": name}


def _assign(source: DatasetDir, manifest: Manifest, shares: Shares, by: str) -> tuple[dict[str, Kept], Seen]:
    """Return the keys of each part by shard. Raises UserError if there are no samples."""
    parts: dict[str, Kept] = {name: {} for name in shares}
    digest, samples = sha256(), 0
    for entry in source.entries():
        digest.update(f"{entry.key}\n".encode())
        samples += 1
        parts[part_of(_unit(manifest, entry, by), shares)].setdefault(entry.shard, set()).add(entry.key)
    if not samples:
        raise UserError(f"{source.root} has no finished sample yet")
    return parts, Seen(samples, digest.hexdigest(), {})


def _unit(manifest: Manifest, entry: SampleEntry, by: str) -> str:
    """Return what decides about a sample, independently of `output.key_prefix`."""
    prompt_id = manifest.prompt_id(entry.key)
    return prompt_id if by == "prompt" else f"{prompt_id}-{entry.sample_index:04d}"


def part_of(unit: str, shares: Shares) -> str:
    """Return the part of a prompt or sample: its hash, as a number in 0..1, falls into the range of one share."""
    position = int.from_bytes(blake2b(unit.encode(), digest_size=8).digest()) / 2**64
    ends = zip(shares, accumulate(shares.values()), strict=True)
    return next((name for name, end in ends if position < end), list(shares)[-1])
