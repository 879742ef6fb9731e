"""Refuse shards of another dataset with the same names and keys, such as those of another method."""

from __future__ import annotations

from collections.abc import Iterable

from madgen.dataset.checks.tar import READ_ERRORS, read_samples
from madgen.dataset.format import FormatError, Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import open_file, parse_object
from madgen.types import shard_index
from madgen.utils.errors import UserError


def shard_fingerprint(directory: DatasetDir, name: str) -> str | None:
    """Return the fingerprint that a shard was made for; None if it is unknown, as for damaged or empty shards."""
    path = directory.tar(name)
    try:
        value = directory.read_summary(name).fingerprint
        if not value:  # earlier versions have it in the JSON of the samples only
            with open_file(path) as stream:
                value = parse_object(next(read_samples(stream)).members["json"], path).get("fingerprint")
    except (OSError, FormatError, StopIteration, *READ_ERRORS):
        return None
    return value if isinstance(value, str) else None


def refuse_foreign_shards(directory: DatasetDir, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raise UserError if a finished shard (of `names`, by default any planned one) was made for another dataset."""
    for name in sorted(directory.done() & set(manifest.shard_names())) if names is None else names:
        fingerprint = shard_fingerprint(directory, name)
        known = manifest.portion(shard_index(name)).fingerprints
        if fingerprint is not None and fingerprint not in known:
            raise UserError(
                f"{directory.tar(name)} is a shard of another dataset (fingerprint {fingerprint:.40}, expected "
                f"{' or '.join(sorted(known))}); "
                f"run madgen verify {directory.root} --repair to mark it for regeneration"
            )


def has_shards_of(directory: DatasetDir, manifest: Manifest) -> bool:
    """Return whether there are finished shards beside a damaged `dataset.json`, all of them made for this dataset.

    Raises FormatError if they show that the dataset has grown beyond it.
    """
    prints = set(filter(None, (shard_fingerprint(directory, name) for name in directory.done())))
    if prints and prints <= manifest.sample_fingerprints:
        return True
    if len(prints) > 1:
        raise FormatError(
            f"{directory.manifest} cannot be read, and no job alone can write it again, because the dataset has grown "
            f"(its shards have the fingerprints {', '.join(sorted(prints))}); restore it from a copy, "
            "such as the one in output.upload or where it was pushed, or choose another output.dir"
        )
    return False
