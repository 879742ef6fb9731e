"""Count the prompts that the backbone's text encoders will truncate, before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from madgen.backbones import backbone_module
from madgen.hub.tokenizers import TextLimit, count_tokens, cut_texts
from madgen.planning.resolved_run import ResolvedRun
from madgen.prompts.table import PromptTable
from madgen.types import Prompt

MAX_CHECKED = 100_000  # prompts; takes a second or two
CHUNK = 1000
MAX_SHOWN = 40  # characters of the text that a prompt loses


@dataclass(frozen=True)
class Truncation:
    """Prompts that are longer than the text encoders' limit."""

    tokens: int
    """Limit of the text encoders."""
    prompts: int
    """Number of truncated prompts among those that were checked."""
    first: str | None
    """File and line of the first one, its number of tokens, and the text that it loses."""
    checked: int
    candidates: int
    """Number of prompts with at least as many bytes as the limit has tokens."""
    shared: bool
    """True if the job's negative prompt, or a prompt of its regions, is truncated."""

    def warnings(self, total: int) -> list[str]:
        """Describe the truncation, given the total number of prompts."""
        lines = []
        if self.shared:
            text = "the job's negative prompt, or a prompt of its regions,"
            lines.append(f"{text} is longer than {self.tokens} tokens and will be truncated")
        if self.prompts:
            partly = self.checked < self.candidates
            prompts = f"prompt{'s' * (total != 1)} {'is' if self.prompts == 1 else 'are'}"
            note = f" (checked the first {self.checked:,} of {self.candidates:,} long prompts)" if partly else ""
            lines.append(
                f"{'at least ' * partly}{self.prompts:,} of {total:,} {prompts} longer than {self.tokens} tokens and "
                f"will be truncated; the first is {self.first}{note}"
            )
        return lines


def count_truncated(run: ResolvedRun) -> Truncation | None:
    """Check the first 100,000 prompts that may be too long; None if the tokenizer is not on this machine."""
    plan = run.plan
    backbone = run.job.backbone
    limit: TextLimit | None = backbone_module(backbone.name).text_limit(run.files, backbone.max_sequence_length)
    if limit is None:
        return None
    max_bytes = limit.tokens - 2  # a token has at least one byte
    shared = [text for text in _texts(plan.prompts.header.defaults.prompt("", "")) if len(text.encode()) > max_bytes]
    candidates = plan.prompts.header.totals.longer_than(max_bytes)
    if not candidates and not shared:
        return Truncation(limit.tokens, 0, None, 0, 0, False)
    tokenizers = limit.load()
    if tokenizers is None:
        return None
    rows = islice(plan.prompts.rows_longer_than(max_bytes), MAX_CHECKED)
    count, first, checked = 0, None, 0
    while piece := list(islice(rows, CHUNK)):
        cut = list(_cut(plan.prompts, piece, tokenizers, set(shared)))
        first = cut[0] if cut and first is None else first
        count, checked = count + len(cut), checked + len(piece)
    described = None if first is None else _described(plan.prompts, first, tokenizers, set(shared))
    return Truncation(limit.tokens, count, described, checked, candidates, any(cut_texts(tokenizers, shared)))


def _described(prompts: PromptTable, row: int, tokenizers: Sequence[Any], shared: set[str]) -> str:
    """Return the location of a truncated prompt, its length, and the beginning of the text that it loses."""
    texts = [text for text in _texts(prompts[row]) if text not in shared]
    cut = zip(texts, cut_texts(tokenizers, texts), strict=True)
    text, lost = next((text, lost) for text, lost in cut if lost is not None)
    lost = lost if len(lost) <= MAX_SHOWN else f"{lost[:MAX_SHOWN]}..."
    return f"{prompts.location(row)}, of {count_tokens(tokenizers, text)} tokens, which loses {lost!r}"


def _cut(prompts: PromptTable, rows: Sequence[int], tokenizers: Sequence[Any], shared: set[str]) -> Iterator[int]:
    """Yield the rows with a truncated text that is not the job's own."""
    dense = rows[-1] - rows[0] < 4 * len(rows)
    near = prompts[rows[0] : rows[-1] + 1] if dense else []
    found = [(row, near[row - rows[0]] if dense else prompts[row]) for row in rows]
    texts = [(row, text) for row, prompt in found for text in _texts(prompt) if text not in shared]
    cut = cut_texts(tokenizers, [text for _, text in texts])
    yield from sorted({row for (row, _), lost in zip(texts, cut, strict=True) if lost is not None})


def _texts(prompt: Prompt) -> list[str]:
    parts = [text for region in prompt.regions for text in (region.text, region.negative)]
    return [text for text in (prompt.text, prompt.negative, *parts) if text]
