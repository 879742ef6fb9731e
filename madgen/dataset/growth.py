"""Add prompts and samples to a dataset: find its generations in the prompts of a job, and plan the next one.

A generation has the tasks of the job that no earlier generation has. Its shards follow theirs, which stay as they are.
Prompts of earlier generations must be among those of the job, unchanged and in the same order. If they are not the
first ones, `Generation.earlier` marks them: one bit for each prompt of the job, packed, compressed by zlib, in base64.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np
import pyarrow as pa

from madgen.dataset.format import FormatError, Generation, QuarantineEntry, SampleEntry, prompt_id
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Part, Plan, Stage
from madgen.prompts.rows import default_id
from madgen.prompts.table import PromptTable, Rows
from madgen.utils.arrow import string_array
from madgen.utils.errors import UserError


class CannotGrowError(UserError):
    """The job's prompts do not contain those of the dataset; the message names the reason."""


def join(plan: Plan, directory: DatasetDir, extend: bool) -> Plan:
    """Return the plan of a job as the dataset in its directory needs it: cut into the generations of that dataset.

    With `extend`, samples that the dataset lacks are planned as its next generation. A plan that neither equals a
    generation nor extends the last one is returned unchanged. Raises CannotGrowError if it should extend it.
    """
    try:
        existing = directory.read_manifest()
        known = existing.all_generations
    except UserError:
        return plan
    if existing.made_by is not None:
        return plan
    for count in range(len(known), 0, -1):
        rows = _match(plan, known[:count])
        if rows is not None:
            return plan if count == 1 else replace(plan, grown=_stages(rows, known[:count]))
    return _extended(plan, directory, known) if extend else plan


def _match(plan: Plan, known: Sequence[Generation]) -> list[Rows] | None:
    """Return the rows that each generation added if the plan is that of the last one, else None."""
    prompts = sum(generation.prompts for generation in known)
    if plan.samples_per_prompt != known[-1].samples_per_prompt or len(plan.prompts) != prompts:
        return None
    if len(known) == 1:
        return [range(prompts)] if plan.prompts.header.prompts_digest == known[0].prompts_digest else None
    return _split(plan.prompts, range(prompts), known)


def _split(table: PromptTable, rows: Rows, known: Sequence[Generation]) -> list[Rows] | None:
    """Divide rows into those that each generation added; None if one of them did not add these prompts."""
    added: list[Rows] = []
    for generation in reversed(known):
        is_earlier = np.zeros(len(rows), bool)
        is_earlier[: max(0, len(rows) - generation.prompts)] = True
        if generation.earlier is not None:
            bits = _unpack(generation.earlier, len(rows))
            if bits is None or bits.sum() != is_earlier.sum():
                return None
            is_earlier = bits
        chosen = np.asarray(rows, np.int64)
        added.insert(0, _compact(chosen[~is_earlier]))
        rows = _compact(chosen[is_earlier])
    pairs = zip(added, known, strict=True)
    return added if all(table.subset_digest(new) == item.prompts_digest for new, item in pairs) else None


def _stages(added: list[Rows], known: Sequence[Generation]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    before, earlier = 0, np.empty(0, np.int64)
    for rows, generation in zip(added, known, strict=True):
        each = generation.samples_per_prompt
        parts = [Part(_compact(earlier), before, each - before), Part(rows, 0, each)]
        stages.append(Stage(tuple(part for part in parts if len(part)), generation))
        earlier, before = np.sort(np.concatenate([earlier, np.asarray(rows, np.int64)])), each
    return tuple(stages)


def _extended(plan: Plan, directory: DatasetDir, known: Sequence[Generation]) -> Plan:
    each, before = plan.samples_per_prompt, known[-1].samples_per_prompt
    if each < before:
        raise CannotGrowError(f"prompts.samples_per_prompt is {each}, and it has {before} of each prompt already")
    rows, added = _earlier_rows(plan.prompts, directory, known)
    is_earlier = np.zeros(len(plan.prompts), bool)
    is_earlier[np.asarray(rows, np.int64)] = True
    new = _compact(np.flatnonzero(~is_earlier))
    samples = len(new) * each + len(rows) * (each - before)
    digest, shards = plan.prompts.subset_digest(new), -(-samples // plan.samples_per_shard)
    earlier = None if isinstance(rows, range) and rows.start == 0 else _pack(is_earlier)
    generation = Generation("", len(new), each, digest, samples, shards, earlier)
    return replace(plan, grown=_stages([*added, new], [*known, generation]))


_NOT_UNCHANGED = "its prompts are not among those of the job, unchanged and in the same order"


def _earlier_rows(table: PromptTable, directory: DatasetDir, known: Sequence[Generation]) -> tuple[Rows, list[Rows]]:
    """Return the rows whose prompts the dataset has, and those that each generation added. Raises CannotGrowError."""
    count = sum(generation.prompts for generation in known)
    first = range(min(count, len(table)))
    added = _split(table, first, known) if len(first) == count else None
    if added is not None:
        return first, added
    reason = f"{_NOT_UNCHANGED}: it has {count} prompts, the job {len(table)}" if len(table) < count else ""
    for recorded in _recorded(directory, count):
        rows = _compact(table.rows_with_ids(recorded.ids))
        added = _split(table, rows, known) if len(rows) == count else None
        if added is not None:
            return rows, added
        reason = _difference(table, rows, recorded)
    raise CannotGrowError(
        reason or f"{_NOT_UNCHANGED}; append new prompts to the old ones, or finish the dataset first"
    )


@dataclass(frozen=True)
class _Recorded:
    """The prompts of a dataset."""

    ids: pa.Array
    read_texts: Callable[[], Iterable[tuple[str, str]]]
    """Return the id and the text of each prompt, in order; prompts may be repeated."""


def _recorded(directory: DatasetDir, count: int) -> Iterator[_Recorded]:
    """Yield the dataset's prompts, as far as they are known: from saved plans, and from the sidecars."""
    for path in sorted(directory.plans.glob("*.arrow")):
        try:
            table = PromptTable.open(path)
        except UserError:
            continue
        if len(table) == count:
            ids = [identity for chunk in table.subset_ids(range(count)) for identity in chunk]
            yield _Recorded(string_array(ids, pa.string()), partial(map, attrgetter("id", "text"), table))
    try:
        ids = list(dict.fromkeys(identity for identity, _ in _sampled(directory)))
    except (OSError, FormatError):
        return
    if len(ids) == count:
        yield _Recorded(string_array(ids, pa.string()), partial(_sampled, directory))


def _sampled(directory: DatasetDir) -> Iterator[tuple[str, str]]:
    """Yield the prompt's id and text of each sample in the finished shards."""
    prefix = directory.read_manifest().key_prefix
    for sidecar in directory.sidecars():
        entries: list[SampleEntry | QuarantineEntry] = [*sidecar.samples, *sidecar.quarantine]
        for entry in entries:
            yield prompt_id(entry.key).removeprefix(prefix), entry.prompt


def _difference(table: PromptTable, rows: Rows, recorded: _Recorded) -> str:
    """Describe the first prompt of a dataset that is missing in a table, or changed; `rows`: those with its ids."""
    present = {identity for chunk in table.subset_ids(rows) for identity in chunk}
    prompts = (table[int(row)] for row in rows)
    for identity, text in dict(recorded.read_texts()).items():
        name = f"its prompt {_shortened(text)}" + ("" if identity == default_id(text) else f" (id {identity})")
        if identity not in present:
            return f"{name} is not among the prompts of the job"
        prompt = next(prompts)
        if prompt.id != identity:
            return f"{name} is not in the same order as before"
        if prompt.text != text:
            return f"{name} is {_shortened(prompt.text)} in the job"
    return f"{_NOT_UNCHANGED}: one has another size, seed, region or place now"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _compact(rows: Rows) -> Rows:
    """Return rows in ascending order as a range if they are consecutive, else as an array."""
    if isinstance(rows, range):
        return rows
    if not len(rows):
        return range(0)
    return range(int(rows[0]), int(rows[-1]) + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


def _pack(bits: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def _unpack(text: str, count: int) -> np.ndarray | None:
    """Invert `_pack`; None if the text is damaged or has another number of bits."""
    size = -(-count // 8)
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error, ValueError):
        return None
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool) if len(data) == size else None
