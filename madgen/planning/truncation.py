"""Counts the prompts that are too long for the backbone's text encoders, before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from madgen.backbones import backbone_module
from madgen.hub.tokenizers import TextLimit, cut_texts
from madgen.planning.resolved_run import ResolvedRun
from madgen.prompts.table import PromptTable
from madgen.types import Prompt

MOST_CHECKED = 100_000  # prompts; a second or two
AT_ONCE = 1000


@dataclass(frozen=True)
class Cuts:
    """What becomes of long prompts."""

    tokens: int
    """That the text encoders take."""
    prompts: int
    """That are cut, among those that were looked at."""
    first: str | None
    """Where the first of them stands."""
    checked: int
    candidates: int
    """That can be too long by their bytes: a token is at least one."""
    shared: bool
    """Whether the job's own negative prompt, or a prompt of its regions, is cut."""

    def warnings(self, total: int) -> list[str]:
        """Lines for people; `total` prompts in all."""
        lines = []
        if self.shared:
            what = "the job's negative prompt, or a prompt of its regions,"
            lines.append(f"{what} is longer than {self.tokens} tokens and will be cut")
        if self.prompts:
            partly = self.checked < self.candidates
            note = f" (of {self.candidates:,} long prompts the first {self.checked:,} were looked at)" if partly else ""
            lines.append(
                f"{'at least ' * partly}{self.prompts:,} of {total:,} prompts are longer than {self.tokens} tokens and "
                f"will be cut; the first is {self.first}{note}"
            )
        return lines


def count_cuts(run: ResolvedRun) -> Cuts | None:
    """Looks at the first 100,000 prompts that can be too long; None where the tokenizer's files are not at hand."""
    plan = run.plan
    limit: TextLimit | None = backbone_module(run.job.backbone.name).text_limit(*run.files)
    if limit is None:
        return None
    most = limit.tokens - 2
    shared = [text for text in _texts(plan.prompts.header.defaults.prompt("", "")) if len(text.encode()) > most]
    candidates = plan.prompts.header.totals.longer_than(most)
    if not candidates and not shared:
        return Cuts(limit.tokens, 0, None, 0, 0, False)
    tokenizers = limit.load()
    if tokenizers is None:
        return None
    rows = islice(plan.prompts.rows_longer_than(most), MOST_CHECKED)
    count, first, checked = 0, None, 0
    while piece := list(islice(rows, AT_ONCE)):
        cut = list(_cut(plan.prompts, piece, tokenizers, set(shared)))
        first = cut[0] if cut and first is None else first
        count, checked = count + len(cut), checked + len(piece)
    where = None if first is None else plan.prompts.location(first)
    return Cuts(limit.tokens, count, where, checked, candidates, any(cut_texts(tokenizers, shared)))


def _cut(prompts: PromptTable, rows: Sequence[int], tokenizers: Sequence[Any], shared: set[str]) -> Iterator[int]:
    """The rows of which a text of their own is cut."""
    dense = rows[-1] - rows[0] < 4 * len(rows)
    near = prompts[rows[0] : rows[-1] + 1] if dense else []
    found = [(row, near[row - rows[0]] if dense else prompts[row]) for row in rows]
    texts = [(row, text) for row, prompt in found for text in _texts(prompt) if text not in shared]
    cut = cut_texts(tokenizers, [text for _, text in texts])
    yield from sorted({row for (row, _), lost in zip(texts, cut, strict=True) if lost is not None})


def _texts(prompt: Prompt) -> list[str]:
    parts = [text for region in prompt.regions for text in (region.text, region.negative)]
    return [text for text in (prompt.text, prompt.negative, *parts) if text]
