"""Select samples by their scores, with SQL on a table of the sidecars' entries. Tars are not opened.

    coherence > 0.8 and (seam < 1.2 or not prompt contains "fog")

Names in `--where` are scores, `seed`, `sample_index`, `height`, `width`, `prompt`, `prompt_id` and kept columns of the
prompts, in backquotes if they are not words. `prompt contains "text"`, also written `"text" in prompt`, ignores case.
A comparison with a score or a column that a sample lacks is neither true nor false, and neither is its negation: the
sample is left out unless the rest of the expression decides.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from madgen.config.schema import SCORES
from madgen.dataset.format import Manifest, SampleEntry
from madgen.dataset.kept_columns import KeptColumns
from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError
from madgen.utils.validation import nearest

LOWER_IS_BETTER = ("seam", "wrap")
NUMBERS = (*SCORES, "sample_index", "height", "width", "seed")
TEXTS = ("prompt_id", "prompt")
COLUMNS = ("shard", "key", *TEXTS, *NUMBERS)
MAX_LENGTH, MAX_NUMBER = 2000, 2**64 - 1
TOKEN = re.compile(
    r"""(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
      | (?P<compare><=|>=|==|!=|<|>|contains\b|in\b|not\s+in\b)
      | (?P<join>and\b|or\b|not\b|[()])
      | (?P<name>[^\W\d]\w*|`[^`]+`)
      | (?P<unknown>[^ ])""",
    re.VERBOSE,
)
READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)


@dataclass(frozen=True)
class Choice:
    """Select the samples for which `where` is true, and of these the `best` of each prompt by a score."""

    where: Where | None = None
    best: int | None = None
    by: str | None = None
    """The lowest is best for `seam` and `wrap`, the highest for other scores; ties go to the first key."""

    def __post_init__(self) -> None:
        if self.where is None and self.best is None:
            raise UserError("nothing to select by: give --where 'coherence > 0.8', --best 1 --by coherence, or both")
        if (self.best is None) != (self.by is None):
            raise UserError("--best and --by go together: --best 1 --by coherence keeps the best sample of each prompt")
        if self.best is not None and self.best < 1:
            raise UserError(f"--best must be >= 1 sample of each prompt, got {self.best}")
        if self.by is not None and self.by not in SCORES:
            raise UserError(f"--by: unknown score {self.by!r}{nearest(self.by, SCORES)}")

    @property
    def needs(self) -> set[str]:
        """Return the names of the scores that the selection depends on."""
        return {*(self.where.scores if self.where else ()), *([self.by] if self.by else [])}


@dataclass
class Seen:
    """Statistics of the samples that were considered."""

    samples: int
    keys_sha256: str
    """Checksum of their keys, one per line."""
    ranges: dict[str, tuple[float, float]]
    """Lowest and highest value of each recorded score."""


def parse(expression: str, kept: KeptColumns | None = None) -> Where:
    """Translate an expression to SQL. Raises UserError with the position (from 1) and the known names.

    `kept`: the kept columns of the dataset.
    """
    if len(expression) > MAX_LENGTH:
        raise UserError(f"--where is {len(expression)} characters long; at most {MAX_LENGTH}")
    if not expression.strip() or not expression.isprintable():
        raise UserError(f"--where must be one line of text, such as 'coherence > 0.8', got {expression[:60]!r}")
    return Where(expression, kept or KeptColumns())


class Where:
    """A parsed `--where` expression: the condition `sql` with the `values` of its placeholders."""

    def __init__(self, expression: str, kept: KeptColumns):
        self.expression, self.kept = expression.strip(), kept
        self.values: list[Any] = []
        self.scores: set[str] = set()
        """Names of the scores in it."""
        self._numbers = (*NUMBERS, *(name for name in kept.types if name not in kept.texts))
        self._texts = (*TEXTS, *(name for name in kept.types if name in kept.texts))
        self._tokens = list(TOKEN.finditer(expression))
        for token in self._tokens:
            if token.lastgroup == "unknown":
                raise self._error(token.start(), f"{token[0]!r} has no meaning here")
        sql: list[str] = []
        while self._tokens:
            is_join = self._tokens[0].lastgroup == "join"
            sql.append(self._tokens.pop(0)[0] if is_join else self._comparisons())
        self.sql = " ".join(sql)
        try:
            load((), kept)[0].execute(f"SELECT key FROM samples WHERE {self.sql}", self.values)
        except sqlite3.Error as error:
            raise self._error(0, f"the expression cannot be parsed ({error})") from error

    def _comparisons(self) -> str:
        """Translate `a < b <= c` to `(a < b AND b <= c)`, consuming its tokens."""
        left, parts = self._tokens.pop(0), list[str]()
        kind = self._kind(left)
        while self._tokens and self._tokens[0].lastgroup == "compare":
            operator = " ".join(self._tokens.pop(0)[0].split())
            if not self._tokens:
                raise self._error(left.end(), "a value is missing at the end")
            right = self._tokens.pop(0)
            if operator in ("contains", "in", "not in"):
                whole, part = (left, right) if operator == "contains" else (right, left)
                if not self._is_text(whole) or part.lastgroup != "text":
                    raise self._error(left.start(), 'write prompt contains "text"')
                self.values.append(self._value(part).casefold())
                parts.append(f"{'NOT ' if operator == 'not in' else ''}contains({self._operand(whole)}, ?)")
            else:
                if self._kind(right) != kind:
                    raise self._error(right.start(), f"this is {self._kind(right)}, and {kind} is needed")
                if kind == "a text" and operator not in ("==", "!="):
                    raise self._error(left.start(), "a text has no order; compare it with ==, != or contains")
                parts.append(f"compare({self._operand(left)}, {self._operand(right)}) {operator} 0")
            left = right
        if not parts:
            raise self._error(left.start(), f"this is {kind}, and a comparison is needed")
        return f"({' AND '.join(parts)})"

    def _kind(self, token: re.Match[str]) -> str:
        """Return `a text` or `a number`."""
        name = _name(token)
        if token.lastgroup == "name" and name not in (*self._numbers, *self._texts):
            suggestion = nearest(name[:40], (*self._numbers, *self._texts)).partition("; known")[0]
            raise self._error(token.start(), f"unknown name {name[:40]!r}{suggestion}")
        if token.lastgroup not in ("name", "number", "text"):
            raise self._error(token.start(), f"{token[0]!r} has no meaning here")
        return "a text" if token.lastgroup == "text" or self._is_text(token) else "a number"

    def _is_text(self, token: re.Match[str]) -> bool:
        return token.lastgroup == "name" and _name(token) in self._texts

    def _operand(self, token: re.Match[str]) -> str:
        if token.lastgroup == "name":
            name, kept = _name(token), list(self.kept.types)
            self.scores.update({name} & set(SCORES))
            return f"kept_{kept.index(name)}" if name in kept else name
        self.values.append(_stored(self._value(token)))
        return "?"

    def _value(self, token: re.Match[str]) -> Any:
        if token.lastgroup == "text":
            return re.sub(r"\\([\\'\"])", r"\1", token[0][1:-1])
        value = int(token[0]) if token[0].lstrip("-").isdecimal() else float(token[0])
        if not abs(value) <= MAX_NUMBER:
            raise self._error(token.start(), "numbers must be below 2^64")
        return value

    def _error(self, at: int, problem: str) -> UserError:
        """Return an error at a position of the expression, with the known names."""
        shown = (*SCORES, "seed", "height", "width", 'prompt contains "text"', "prompt_id", "sample_index")
        known = ", ".join((*shown, *self.kept.types))
        return UserError(
            f"--where, character {at + 1}: {problem}; an expression may hold and, or, not, < <= > >= == != and {known}"
        )


def _name(token: re.Match[str]) -> str:
    return token[0].strip("`")


def _stored(value: Any) -> Any:
    """Return a value as SQLite can store it: integers beyond 64 bits with sign, such as large seeds, as bytes."""
    return str(value).encode() if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def _compare(left: Any, right: Any) -> int | None:
    """Return a number that compares with 0 as two stored values compare exactly; None if one is missing."""
    if left is None or right is None:
        return None
    left, right = (int(value) if isinstance(value, bytes) else value for value in (left, right))
    return (left > right) - (left < right)


def load(
    entries: Iterable[SampleEntry], kept: KeptColumns | None = None, about: Manifest | None = None
) -> tuple[sqlite3.Connection, str]:
    """Return a temporary, read-only database with the table `samples`, and the sha256 of the keys.

    `about` is the manifest of the dataset.
    """
    database, digest = sqlite3.connect(""), hashlib.sha256()
    kept = kept or KeptColumns()
    columns = (*COLUMNS, *(f"kept_{number}" for number in range(len(kept.types))))
    database.execute(f"CREATE TABLE samples ({', '.join(columns)})")

    def rows() -> Iterable[tuple[Any, ...]]:
        for entry in entries:
            digest.update(f"{entry.key}\n".encode())
            identity = entry.prompt_id if about is None else about.prompt_id(entry.key)
            scores = [(entry.scores or {}).get(name) for name in SCORES]
            values = (*scores, entry.sample_index, *entry.shape, entry.seed, *kept.values(entry).values())
            yield (entry.shard, entry.key, identity, entry.prompt, *map(_stored, values))

    database.executemany(f"INSERT INTO samples VALUES ({', '.join('?' * len(columns))})", rows())
    database.create_function("contains", 2, _contains, deterministic=True)
    database.create_function("compare", 2, _compare, deterministic=True)
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
    return database, digest.hexdigest()


def _contains(text: str | None, part: str) -> bool | None:
    return None if text is None else part in text.casefold()


def choose(directory: DatasetDir, choice: Choice) -> tuple[dict[str, set[str]], Seen]:
    """Return the selected keys by shard, in order. Raises UserError if a score is missing or nothing is left."""
    manifest = directory.read_manifest()
    columns = choice.where.kept if choice.where else None
    database, digest = load(directory.entries(), columns, manifest)
    bounds = ", ".join(f"min({name}), max({name})" for name in SCORES)
    samples, *extrema = database.execute(f"SELECT count(*), {bounds} FROM samples").fetchone()
    pairs = zip(SCORES, zip(extrema[::2], extrema[1::2], strict=True), strict=True)
    seen = Seen(samples, digest, {name: pair for name, pair in pairs if pair[0] is not None})
    _check_scores(directory, choice, seen)
    condition, values = (f"({choice.where.sql})", choice.where.values) if choice.where else ("TRUE", ())
    query = f"SELECT shard, key FROM samples WHERE {condition} ORDER BY rowid"
    if choice.best is not None:
        order = "ASC" if choice.by in LOWER_IS_BETTER else "DESC"
        rank = f"row_number() OVER (PARTITION BY prompt_id ORDER BY {choice.by} {order}, key) AS place"
        ranked = f"SELECT rowid AS at, shard, key, {rank} FROM samples WHERE {condition} AND {choice.by} IS NOT NULL"
        query, values = f"SELECT shard, key FROM ({ranked}) WHERE place <= ? ORDER BY at", (*values, choice.best)
    kept: dict[str, set[str]] = {}
    for shard, key in database.execute(query, values):
        kept.setdefault(shard, set()).add(key)
    if not kept:
        ranges = [f"{name} is {low:g} to {high:g}" for name, (low, high) in seen.ranges.items() if name in choice.needs]
        hint = ", ".join(ranges) or "relax the selection"
        raise UserError(f"no sample of {directory.root} matches, out of {seen.samples}; {hint}")
    return kept, seen


def _check_scores(directory: DatasetDir, choice: Choice, seen: Seen) -> None:
    if not seen.samples:
        raise UserError(f"{directory.root} has no finished sample yet")
    missing = sorted(choice.needs - set(seen.ranges))
    if missing and not seen.ranges:
        raise UserError(
            f"{directory.root} has no scores; generate records them unless scores.enabled=[], and clip with "
            "scores.clip=MODEL: generate it again with scores in another output.dir"
        )
    if missing:
        reasons = {"wrap": " is recorded for loops", "clip": " needs scores.clip=MODEL in the job"}
        raise UserError(
            f"no sample of {directory.root} has the score {missing[0]!r}, only {', '.join(seen.ranges)}; "
            f"{missing[0]}{reasons.get(missing[0], ' is recorded if scores.enabled lists it')}"
        )
