"""Check that every planned sample exists and is intact. Reads tars with `tarfile`, independently of the writer."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from madgen.dataset.checks.derived import derived_problems
from madgen.dataset.checks.manifest import manifest_problems
from madgen.dataset.checks.plan import PlanCheck
from madgen.dataset.checks.sample import Expected
from madgen.dataset.checks.shard import ShardResult, check_shard, sidecar_time
from madgen.dataset.format import FormatError, Manifest, SampleEntry, portion_at
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.journal import open_pieces
from madgen.types import shard_index
from madgen.utils.console import plural
from madgen.utils.errors import UserError
from madgen.utils.ordered_map import ordered_map


@dataclass
class Verdict:
    """The result of a verification; `problems` is empty if all shards that exist are intact and as planned."""

    planned: int | None
    """None if `dataset.json` is damaged."""
    present: int = 0
    kept: int = 0
    """Intact samples in open shards, which the next run keeps."""
    quarantined: int = 0
    problems: list[str] = field(default_factory=list)
    broken: dict[str, Broken] = field(default_factory=dict)
    """Planned shards with a problem, except those with a read error that may be temporary."""
    unplanned: list[Path] = field(default_factory=list)
    """Files in `shards/` that are not planned."""
    derived: list[str] = field(default_factory=list)
    """Problems of the files that are derived from the shards."""
    lost: int | None = 0
    """Samples of the broken shards to generate again; None: only the plan can tell."""
    fix: str = ""
    """How to repair the dataset."""

    @property
    def complete(self) -> bool:
        """Return whether every planned sample is intact or quarantined."""
        return not self.problems and self.present + self.quarantined == self.planned


@dataclass(frozen=True)
class Broken:
    """A shard to regenerate, except for its intact samples."""

    whole: list[SampleEntry]
    """Sidecar entries of the intact samples."""
    changed: int | None
    """Modification time of the checked sidecar in ns; None if it was missing."""


def verify(directory: DatasetDir, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Verdict:
    """Check tars, checksums and images against sidecars and plan, calling `on_shard(done, total)` after each shard.

    Without a readable `dataset.json` nothing else is checked.
    """
    try:
        manifest = directory.read_manifest()
        expected, committed = set(manifest.shard_names()), directory.committed()
    except FormatError as error:
        return Verdict(None, problems=[str(error)])
    verdict = Verdict(manifest.plan.samples, problems=manifest_problems(manifest))
    trusted = not verdict.problems
    _find_unplanned(directory, expected, verdict)
    names = sorted(committed & expected)
    shards = _Shards(manifest, verdict)
    with _any_image_size(), contextlib.closing(ordered_map(_check(directory, manifest), names)) as results:
        for done, (name, result) in enumerate(zip(names, results, strict=True), 1):
            shards.add(name, result)
            on_shard(done, len(names))
    shards.finish(directory, names)
    verdict.kept = sum(shard in expected for shard, _ in open_pieces(directory, set(names)))
    complete = verdict.complete and len(names) == manifest.plan.shards
    if complete and not directory.work.exists():  # else `generate` has yet to write them
        verdict.derived = derived_problems(directory, manifest)
        verdict.problems += verdict.derived
    if not trusted:  # shards cannot be compared with a plan that may be wrong
        verdict.broken.clear()
        verdict.unplanned.clear()
    verdict.fix = _fix(verdict, directory, manifest, trusted)
    return verdict


class _Shards:
    def __init__(self, manifest: Manifest, verdict: Verdict):
        self.manifest, self.verdict = manifest, verdict
        self.plan = PlanCheck(manifest)
        self.seen: set[bytes] = set()
        self.twice: set[str] = set()
        self.contradiction = False
        """Intact samples of a prompt contradict each other."""
        self.unread = False
        """A shard could not be read, so that the others cannot be blamed for what is missing."""

    def add(self, name: str, result: ShardResult) -> None:
        """Add the result of a shard."""
        verdict = self.verdict
        wrong = self.plan.add(shard_index(name), result.samples, result.keys)
        if not result.foreign:
            result.problems += wrong
            self.contradiction |= bool(wrong)
            for key, mark in zip(result.keys, map(_mark, result.keys), strict=True):
                self.twice.update([key] if mark in self.seen else [])
                self.seen.add(mark)
        self.unread |= result.unread
        verdict.problems += [f"{name}: {problem}" for problem in result.problems]
        verdict.present += result.present
        verdict.quarantined += len(result.keys) - result.present
        if result.problems and not result.unread:
            verdict.broken[name] = Broken(result.whole, result.changed)
            if verdict.lost is not None:
                planned = self.manifest.portion(shard_index(name)).planned(shard_index(name))
                verdict.lost += planned - len(result.whole)

    def finish(self, directory: DatasetDir, names: list[str]) -> None:
        """Compare all shards with the plan; where only the whole contradicts it, every shard may be the wrong one."""
        verdict = self.verdict
        verdict.problems += [f"{key} occurs twice" for key in sorted(self.twice)]
        keys, prompts = self.plan.finish()
        settled = verdict.present + verdict.quarantined
        if settled == verdict.planned and not verdict.problems:
            verdict.problems += [] if keys else ["the keys are not the planned ones"]
            verdict.problems += [] if prompts else ["prompts, sizes or seeds are not the planned ones"]
        elif settled != verdict.planned and not verdict.problems and len(names) == self.manifest.plan.shards:
            verdict.problems.append(f"{plural(settled, 'sample')} in all shards, {verdict.planned} planned")
        nobody = verdict.problems and not verdict.broken and not verdict.unplanned and not self.unread
        if nobody or self.twice or self.contradiction:
            self._blame_all(directory, names)

    def _blame_all(self, directory: DatasetDir, names: list[str]) -> None:
        """Mark the shards that may be wrong: `generate` keeps the samples that are those of its plan."""
        self.verdict.lost = None
        for name in names:
            with contextlib.suppress(OSError, UserError):
                entries = list(directory.read_sidecar(name).samples)
                if name not in self.verdict.broken:
                    self.verdict.broken[name] = Broken(entries, sidecar_time(directory, name))


def _find_unplanned(directory: DatasetDir, expected: set[str], verdict: Verdict) -> None:
    """Report the tars and sidecars in `shards/` that are not planned, except hidden ones."""
    strangers = sorted(directory.committed() - expected)
    verdict.problems += [f"{name}: a shard that was not planned" for name in strangers]
    tars = {path.stem for path in directory.shards.glob("*.tar") if not path.name.startswith(".")}
    verdict.problems += [f"{name}.tar: not planned" for name in sorted(tars - expected)]
    files = [*map(directory.tar, sorted(tars - expected)), *map(directory.sidecar, strangers)]
    verdict.unplanned = [path for path in files if os.path.lexists(path)]


@contextlib.contextmanager
def _any_image_size() -> Iterator[None]:
    """Lift Pillow's limit: the size in an image's header is compared with the sidecar before it is decoded."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check(directory: DatasetDir, manifest: Manifest) -> Callable[[str], ShardResult]:
    """Return a function that checks a shard by its name."""
    portions = manifest.portions()
    expected = list(map(Expected.of, portions))

    def check(name: str) -> ShardResult:
        at = portion_at(portions, index := shard_index(name))
        return check_shard(directory, name, portions[at].planned(index), expected[at])

    return check


def _mark(key: str) -> bytes:
    """Return a 16-byte hash of a key, to save memory for datasets of ten million samples."""
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _fix(verdict: Verdict, directory: DatasetDir, manifest: Manifest, trusted: bool) -> str:
    """Return how to repair the dataset; '' if nothing is broken, or reading may succeed at the next attempt."""
    if made_by := manifest.made_by:
        return f"remove it, then madgen {made_by} again" if verdict.problems else ""
    if not trusted:
        return "rerun the job that generated it, which writes dataset.json again; then verify again"
    repair = shlex.join(["madgen", "verify", str(directory.root), "--repair"])
    if verdict.broken:
        return f"{repair}; then rerun the job to generate what is missing"
    return repair if verdict.derived or verdict.unplanned else ""


def print_verdict(verdict: Verdict, as_json: bool, repairing: bool = False) -> None:
    """Print the verdict as text, or as JSON for scripts; without the repair that is being done."""
    if as_json:
        counts = {name: getattr(verdict, name) for name in ("complete", "planned", "present", "kept", "quarantined")}
        print(json.dumps({**counts, "broken": sorted(verdict.broken), "problems": verdict.problems}, indent=1))
        return
    for problem in verdict.problems:
        print(problem)
    if verdict.fix and not repairing:
        print(f"to repair: {verdict.fix}")
    state = "as planned" if verdict.complete else "broken" if verdict.problems else "incomplete, nothing broken"
    quarantined = f", {verdict.quarantined} quarantined" if verdict.quarantined else ""
    if verdict.planned is None:
        print("the shards were not checked: broken")
    else:
        kept = f", {verdict.kept} more in open shards" if verdict.kept else ""
        print(f"{verdict.present} of {plural(verdict.planned, 'panorama')} present{kept}{quarantined}: {state}")


def exit_code(verdict: Verdict) -> int:
    """Return 0 if complete, 4 if complete with quarantined samples, 3 if incomplete, 1 if broken."""
    if verdict.complete:
        return 4 if verdict.quarantined else 0
    return 1 if verdict.problems else 3
