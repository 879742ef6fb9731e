"""Which samples of a dataset to keep, by what the sidecars say of them: no tar is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from madgen.config.schema import SCORES, nearest
from madgen.dataset.filtering.expression import Where
from madgen.dataset.format import prompt_id
from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError

LOWER_IS_BETTER = ("seam", "wrap")


@dataclass(frozen=True)
class Choice:
    """What to keep: samples of which `where` is true, and of those the `best` of each prompt `by` a score."""

    where: Where | None = None
    best: int | None = None
    by: str | None = None
    """The highest, of `seam` and `wrap` the lowest; of equal ones that with the first key."""

    def __post_init__(self) -> None:
        if self.where is None and self.best is None:
            raise UserError("say what to keep: --where 'coherence > 0.8', or --best 1 --by coherence, or both")
        if (self.best is None) != (self.by is None):
            raise UserError("--best and --by go together: --best 1 --by coherence keeps the best sample of each prompt")
        if self.best is not None and self.best < 1:
            raise UserError(f"--best must be >= 1 sample of each prompt, got {self.best}")
        if self.by is not None and self.by not in SCORES:
            raise UserError(f"--by: unknown score {self.by!r}{nearest(self.by, SCORES)}")

    @property
    def needs(self) -> set[str]:
        """The scores without which it has no meaning."""
        return {*(self.where.scores if self.where else ()), *([self.by] if self.by else [])}


@dataclass
class Seen:
    """What went past: samples and the scores that they have."""

    samples: int = 0
    keys: Any = field(default_factory=hashlib.sha256)
    """Digest over their keys, one a line."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.samples += 1
        self.keys.update(f"{row['key']}\n".encode())
        for name in SCORES:
            if (value := row.get(name)) is not None:
                low, high = self.ranges.get(name, (value, value))
                self.ranges[name] = min(low, value), max(high, value)


def choose(directory: DatasetDir, choice: Choice) -> tuple[dict[str, set[str]], Seen]:
    """The keys to keep, by their shards in order; UserError if a score is missing, or nothing is left."""
    seen, found = Seen(), list[tuple[str, str, float]]()
    for shard, row in _rows(directory):
        seen.add(row)
        if (choice.where is None or choice.where(row)) and (choice.by is None or row.get(choice.by) is not None):
            found.append((shard, row["key"], row[choice.by] if choice.by else 0.0))
    _check_scores(directory, choice, seen)
    if choice.best is not None and choice.by is not None:
        found = _best(found, choice.best, 1 if choice.by in LOWER_IS_BETTER else -1)
    if not found:
        told = [f"{name} is {low:g} to {high:g}" for name, (low, high) in seen.ranges.items() if name in choice.needs]
        raise UserError(
            f"none of the {seen.samples} samples of {directory.root} is left; {', '.join(told) or 'ease it'}"
        )
    kept: dict[str, set[str]] = {}
    for shard, key, _ in found:
        kept.setdefault(shard, set()).add(key)
    return kept, seen


def _rows(directory: DatasetDir) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in directory.entries():
        yield entry.shard, {**(entry.scores or {}), "key": entry.key, "prompt": entry.prompt, "seed": entry.seed,
                            "height": entry.height, "width": entry.width}  # fmt: skip


def _best(found: list[tuple[str, str, float]], count: int, sign: int) -> list[tuple[str, str, float]]:
    """The best of each prompt, in the order in which they came."""
    ranked = sorted(found, key=lambda item: (prompt_id(item[1]), sign * item[2], item[1]))
    kept: set[str] = set()
    before, rank = None, 0
    for _, key, _ in ranked:
        rank = rank + 1 if prompt_id(key) == before else 0
        before = prompt_id(key)
        kept |= {key} if rank < count else set()
    return [item for item in found if item[1] in kept]


def _check_scores(directory: DatasetDir, choice: Choice, seen: Seen) -> None:
    if not seen.samples:
        raise UserError(f"{directory.root} has no finished sample yet")
    missing = sorted(choice.needs - set(seen.ranges))
    if missing and not seen.ranges:
        raise UserError(
            f"{directory.root} has no scores; generate records them with the pictures, unless scores.enabled=[], and "
            "clip with scores.clip=MODEL: make it again with them, in another output.dir"
        )
    if missing:
        ways = {"wrap": " is of looped panoramas", "clip": " needs scores.clip=MODEL where it is generated"}
        raise UserError(
            f"no sample of {directory.root} has the score {missing[0]!r}, only {', '.join(seen.ranges)}; "
            f"{missing[0]}{ways.get(missing[0], ' is recorded where scores.enabled has it')}"
        )
