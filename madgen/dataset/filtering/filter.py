"""Write selected samples of a dataset to a new dataset, copying their bytes unchanged, or list their keys."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from madgen.dataset.filtering.selection import Choice, Seen, choose
from madgen.dataset.format import Manifest, PlanTotals, SampleEntry
from madgen.dataset.identity import fingerprint
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.new_directory import new_directory
from madgen.dataset.shards.copying import Kept, selected_entries, write_shard
from madgen.utils.atomic import check_new_directory, sync_directory, write_atomically
from madgen.utils.console import plural
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)

STDOUT = "-"
Part = TypeVar("Part")


def filter_dataset(source: DatasetDir, choice: Choice, target: Path | None, keys: Path | None) -> None:
    """Run `madgen filter`: write a dataset or a list of keys, and print the number of samples."""
    if (target is None) == (keys is None):
        raise UserError("choose one output: -o NEWDIR for a dataset, or --keys FILE for a list of keys")
    with reading_shards():
        if target is not None:
            count, seen = write_filtered(source, choice, target)
        elif keys is not None:
            count, seen = write_keys(source, choice, keys)
    warn_if_unfinished(source, seen.samples, source.read_manifest())
    to_stdout = str(keys) == STDOUT
    print(
        f"{target or keys}: {count} of {plural(seen.samples, 'sample')}", file=sys.stderr if to_stdout else sys.stdout
    )


@contextlib.contextmanager
def reading_shards() -> Iterator[None]:
    """Raise UserError if a shard disappears, as `generate` may reopen it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} has disappeared; retry when generate has finished") from error


def warn_if_unfinished(source: DatasetDir, samples: int, manifest: Manifest) -> None:
    """Log a warning if a dataset has fewer samples now than planned."""
    planned = manifest.plan.samples
    if samples < planned:
        logger.warning("%s has %d of %d samples now; the others were left out", source.root, samples, planned)


def write_keys(source: DatasetDir, choice: Choice, path: Path) -> tuple[int, Seen]:
    """Write the selected keys to a file, one per line, in order; return their number and the statistics.

    The path `-` is the standard output.
    """
    source.read_manifest()
    to_stdout = str(path) == STDOUT
    if path.exists() and not to_stdout:
        raise UserError(f"--keys {path} exists already; choose another file")
    if not path.parent.is_dir():
        raise UserError(f"--keys {path}: the folder {path.parent} does not exist")
    kept, seen = choose(source, choice)
    keys = [f"{entry.key}\n" for entry in selected_entries(source, kept)]
    if to_stdout:
        print(*keys, sep="", end="")
    else:
        write_atomically(path, "".join(keys).encode())
    return len(keys), seen


def assign(entries: Iterable[SampleEntry], part_of: Callable[[SampleEntry], Part]) -> tuple[dict[Part, Kept], Seen]:
    """Return the keys of each part of some samples by shard, and the statistics of the samples."""
    parts: dict[Part, Kept] = {}
    digest, samples = hashlib.sha256(), 0
    for entry in entries:
        digest.update(f"{entry.key}\n".encode())
        samples += 1
        parts.setdefault(part_of(entry), {}).setdefault(entry.shard, set()).add(entry.key)
    return parts, Seen(samples, digest.hexdigest(), {})


def write_filtered(source: DatasetDir, choice: Choice, target: Path) -> tuple[int, Seen]:
    """Write a dataset of the selected samples, published by rename; return their number and the statistics.

    Its bytes depend only on the source's samples and the selection. Raises UserError before anything is written, or if
    the source is damaged.
    """
    manifest = source.read_manifest()
    check_new_directory(target)
    kept, seen = choose(source, choice)
    selection = {"where": choice.where and choice.where.expression, "best": choice.best, "by": choice.by}
    with new_directory(target) as temporary:
        write_selection(source, kept, DatasetDir(temporary), selected_manifest(source, manifest, selection, kept, seen))
    return sum(map(len, kept.values())), seen


def write_selection(source: DatasetDir, kept: Kept, out: DatasetDir, content: Manifest) -> None:
    """Write a dataset of the selected samples. Raises UserError if the source is damaged."""
    out.shards.mkdir(parents=True)
    entries = selected_entries(source, kept)
    for name in content.shard_names():
        write_shard(source, islice(entries, content.plan.samples_per_shard), out, name, "filter")
    write_atomically(out.manifest, content.to_json())
    write_index(out)
    sync_directory(out.shards)


def selected_manifest(
    source: DatasetDir, manifest: Manifest, selection: dict[str, Any], kept: Kept, seen: Seen
) -> Manifest:
    """Return the manifest: the plan is the selected samples, `filtered` describes the source and the selection."""
    keys = [entry.key for entry in selected_entries(source, kept)]
    filtered = {
        "from": {
            "name": manifest.name,
            "fingerprint": manifest.fingerprint,
            "samples": seen.samples,
            "keys_sha256": seen.keys_sha256,
            "filtered": manifest.filtered,
            **({"generations": [item.fingerprint for item in manifest.generations]} if manifest.generations else {}),
        },
        **selection,
    }
    identity = {**manifest.identity, "filtered": filtered}
    per_shard, prompts = manifest.plan.samples_per_shard, len({manifest.prompt_id(key) for key in keys})
    digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
    plan = PlanTotals(prompts, len(keys), -(-len(keys) // per_shard), per_shard, digest)
    own = fingerprint(identity)
    return replace(manifest, fingerprint=own, identity=identity, plan=plan, filtered=filtered, generations=None)
