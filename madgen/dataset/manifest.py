"""Build and check `dataset.json`, whose fingerprint prevents different jobs from sharing a directory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from madgen.config.schema import Job
from madgen.config.schema.checks import as_yaml
from madgen.dataset.checks.manifest import manifest_problems
from madgen.dataset.foreign_shards import has_shards_of
from madgen.dataset.format import FormatError, Manifest, PlanTotals, to_json
from madgen.dataset.identity import WeightIds, fingerprint, job_identity
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.hub.license import licences
from madgen.utils.atomic import atomic, file_system_time, sync_directory, write_atomically
from madgen.utils.errors import STORAGE_ERRORS, UserError

VERSIONED = ("madgen", "torch", "diffusers", "transformers", "lightning", "webdataset", "pillow")


def manifest(job: Job, plan: Plan, identity: dict[str, Any]) -> Manifest:
    """Return the content of `dataset.json`."""
    own, versions = fingerprint(identity), {name: _version(name) for name in VERSIONED}
    generations = [stage.generation for stage in plan.grown if stage.generation is not None]
    if generations:
        newest = generations[-1]
        generations[-1] = replace(newest, fingerprint=own, versions=newest.versions or versions)
    grown, terms = tuple(generations) or None, licences(job.backbone)
    return Manifest(own, job.as_dict(), plan_totals(plan), identity, terms, versions=versions, generations=grown)


def plan_totals(plan: Plan) -> PlanTotals:
    """Return the totals of a plan."""
    return PlanTotals(len(plan.prompts), plan.samples, plan.shard_count, plan.samples_per_shard, plan.keys_digest)


@cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_directory(directory: DatasetDir, content: Manifest | None, resume: str, why: str | None = None) -> None:
    """Raise UserError if a directory holds another job's dataset or other files; write nothing.

    `content` is the manifest of the job, or None if it is not known yet. `why`: the reason why the job's prompts cannot
    extend those of the dataset.
    """
    root = directory.root
    occupied = _existing_parent(directory)
    if not occupied.is_dir():
        raise UserError(f"output.dir={root}: {occupied} is a file; choose a directory")
    if directory.manifest.exists():
        if not directory.manifest.is_file():
            raise UserError(f"{directory.manifest} is not a file; remove it, or choose another output.dir")
        try:
            existing = directory.read_manifest()
        except FormatError:
            if content is not None and not has_shards_of(directory, content):
                raise
            return  # `create` writes it again
        directory.check_kinds(set(existing.shard_names()))
        if existing.made_by is not None:
            what = "wrote" if existing.filtered is None else "chose of a dataset"
            raise UserError(f"output.dir={root} holds what madgen {existing.made_by} {what}; choose another")
        if resume == "never":
            raise UserError(f"output.dir={root} holds a dataset already and output.resume=never; choose another")
        changed = [] if content is None else _changed(existing, content, resume)
        if changed or (why is not None and resume == "extend"):
            listed = f" ({'; '.join(changed)})" if changed else ""
            fix = ""
            if all(line.startswith("prompts.") for line in changed):
                fix = "set output.resume=extend to add prompts or samples to it, or "
                fix = f"output.resume=extend only adds to it, and {why}; " if why is not None else fix
            raise UserError(
                f"output.dir={root} holds a dataset of another job{listed}; "
                f"{fix}choose another output.dir, or remove this one"
            )
    elif root.is_dir() and any(not entry.name.startswith(".") for entry in os.scandir(root)):
        raise UserError(f"output.dir={root} is not empty and holds no madgen dataset; choose another")


PROMPT_KEYS = ("prompts.", "sampling.height", "sampling.width")
GROWING = ("extends: ", "prompts.digest: ", "prompts.samples_per_prompt: ")
"""Differences of identities that a next generation may have."""


def _changed(existing: Manifest, content: Manifest, resume: str) -> list[str]:
    """Return why a job cannot resume a dataset: the differences of their identities.

    Empty if the job is that of a generation of the dataset, or its next one. Digests of prompts are replaced by the
    keys of the job that differ.
    """
    if content.fingerprint == existing.fingerprint or is_earlier(existing, content):
        return []
    changes = differences(existing.identity, content.identity)
    if resume == "extend" and extends(existing, content):
        return [line for line in changes if not line.startswith(GROWING)]
    changes = [line for line in changes if not line.startswith("extends: ")]
    if not any(line.startswith("prompts.digest") for line in changes):
        return changes
    job_changes = [line for line in differences(existing.job, content.job) if line.startswith(PROMPT_KEYS)]
    others = [line for line in changes if not line.startswith("prompts.")]
    return [*others, *(job_changes or ["prompts.source: other prompts or masks now"])]


def is_earlier(existing: Manifest, content: Manifest) -> bool:
    """Return whether a dataset has grown since the job of `content`, whose shards it still has."""
    return content.fingerprint in {generation.fingerprint for generation in (existing.generations or ())[:-1]}


def extends(existing: Manifest, content: Manifest) -> bool:
    """Return whether `content` is planned as the next generation of a dataset."""
    generations = content.generations or ()
    return len(generations) > 1 and generations[-2].fingerprint == existing.fingerprint


def extend(directory: DatasetDir, content: Manifest) -> None:
    """Record the next generation in `dataset.json`. Only one process may do so at a time."""
    if extends(directory.read_manifest(), content):
        write_atomically(directory.manifest, content.to_json())


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return one line for every leaf that differs, with its key, old value and new value."""
    changes: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{key}.")
        elif _plain(before) != _plain(after):
            changes.append(f"{prefix}{key}: {_as_yaml(before, key)} there, {_as_yaml(after, key)} here")
    return changes


def _as_yaml(value: Any, key: str) -> str:
    return "false" if value is None and key == "compile" else as_yaml(value)  # omitted from the identity if off


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def create(directory: DatasetDir, content: Manifest, resume: str = "if_same") -> None:
    """Write `dataset.json` unless it exists. Of concurrent workers, one writes it, the others compare theirs.

    A damaged one is written again if it, or the finished shards, are of the same job.
    """
    created = [path for path in (directory.root, *directory.root.parents) if not path.exists()]
    try:
        _create(directory, content, resume)
    except UserError:
        for path in created:
            with contextlib.suppress(OSError):  # not created, or in use by another process
                path.rmdir()
        raise
    sync_directory(directory.root)
    directory.shards.mkdir(exist_ok=True)


def _create(directory: DatasetDir, content: Manifest, resume: str) -> None:
    """Write `dataset.json`, or compare it if it exists."""
    try:
        directory.root.mkdir(parents=True, exist_ok=True)
        with atomic(directory.manifest, overwrite=False) as stream:
            stream.write(content.to_json())
    except FileExistsError:
        check_directory(directory, content, "if_same" if resume == "never" else resume)
        if _is_damaged(directory, content):
            write_atomically(directory.manifest, content.to_json())
    except OSError as error:
        if directory.manifest.exists() and error.errno in STORAGE_ERRORS:
            raise  # resuming: a full disk, for example, stops the run
        raise _cannot_be_written(directory, error) from error


def check_writable(directory: DatasetDir) -> None:
    """Raise UserError if a new dataset cannot be written; leaves nothing behind."""
    try:
        file_system_time(_existing_parent(directory))
    except OSError as error:
        raise _cannot_be_written(directory, error) from error


def _existing_parent(directory: DatasetDir) -> Path:
    """Return the directory itself if it exists, else its nearest parent that does."""
    root = directory.root
    return next((path for path in (root, *root.parents) if path.exists()), root)


def _cannot_be_written(directory: DatasetDir, error: OSError) -> UserError:
    return UserError(f"output.dir={directory.root} cannot be written ({error.strerror}); choose another output.dir")


def _is_damaged(directory: DatasetDir, content: Manifest) -> bool:
    """Return whether `dataset.json` cannot be parsed, contradicts itself, or has another plan than its job."""
    try:
        existing = directory.read_manifest()
    except FormatError:
        return True
    if is_earlier(existing, content) or extends(existing, content):
        return False
    identity = json.loads(to_json(content.identity))  # with lists in place of tuples
    same = (existing.fingerprint, existing.identity, existing.plan) == (content.fingerprint, identity, content.plan)
    return not same or bool(manifest_problems(existing))


def build(job: Job, plan: Plan, dtype: str, config: str | None = None) -> Manifest:
    """Build the manifest of a job whose weights are on this machine, sampled in `dtype` (resolved if it is `auto`).

    `config`: see `WeightIds.of`.
    """
    return manifest(job, plan, job_identity(job, plan, dtype, WeightIds.of(job, config)))
