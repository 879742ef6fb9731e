"""Find syntax of other programs in prompts, which is sampled literally."""

from __future__ import annotations

import heapq
import re
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from madgen.prompts.digests import offsets_of
from madgen.prompts.readers import suffix_of
from madgen.prompts.rows import LINE_BITS
from madgen.prompts.table import PromptTable
from madgen.utils.arrow import booleans, integers

COMMENT = "#"
HEADERS = {"prompt", "prompts", "text", "caption", "captions"}
PATTERNS = (
    re.compile(  # options of scripts of the Stable Diffusion web UI, sd-scripts and Midjourney
        rb"--(?:prompt|negative_prompt|sampler_name|sampler|steps|cfg_scale|seed|width|height|batch_size|n_iter|ar"
        rb"|no|stylize|style|[nwhdlsgv])(?=[ =]\S)"
    ),
    re.compile(rb"<(?:lora|lyco|hypernet):[^<>\n]+>"),
    re.compile(rb"\([^()\n]{0,199}[^()\n0-9]:[0-9]*\.?[0-9]+\)"),  # weights
)


def literal_syntax(table: PromptTable) -> list[str]:
    """Return warnings about lines that other programs treat as comments or headers, and their options and weights."""
    return [*_first_lines(table), *_syntax(table)]


def _first_lines(table: PromptTable) -> Iterator[str]:
    """Yield a warning if a prompt of a text file looks like a comment, or the first one like a header."""
    for row in heapq.merge(sorted(_first_rows(table)), _comments(table)):
        text, location = table[row].text, table.location(row)
        if suffix_of(location.rpartition(":")[0]) != ".txt":
            continue
        if text.startswith(COMMENT):  # elsewhere than in the first line it may be a tag, unless a blank follows
            yield (
                f"{location} starts with # and is sampled as a prompt ({text[:40]!r}); to ignore such lines, set "
                'prompts.comments="#"'
            )
            return
        if text.strip().lower() in HEADERS:
            yield (
                f"{location} is {text!r}, which looks like a header and is sampled as a prompt; a .txt has one prompt "
                "per line and no header: remove the line, or rename the file to .csv"
            )
            return


def _comments(table: PromptTable) -> Iterator[int]:
    """Yield the rows whose text starts with `# `, in order."""
    if any(suffix_of(source) == ".txt" for source in table.header.sources):
        start = f"{COMMENT} "
        yield from table.rows_where(lambda batch: booleans(compute.starts_with(batch.column("text"), start)))


def _first_rows(table: PromptTable) -> list[int]:
    first: dict[int, tuple[int, int]] = {}
    for start, batch in zip(table.starts, table.batches, strict=True):
        places = integers(batch.column("place"))
        order = np.argsort(places, kind="stable")
        sources, at = np.unique(places[order] >> LINE_BITS, return_index=True)
        for source, row in zip(sources.tolist(), order[at].tolist(), strict=True):
            candidate = (int(places[row]), start + row)
            first[source] = min(first.get(source, candidate), candidate)
    return [row for _, row in first.values()]


def _syntax(table: PromptTable) -> Iterator[str]:
    """Yield one warning about the first prompt with an option, a weight or a LoRA in its text."""
    for start, batch in zip(table.starts, table.batches, strict=True):
        matches = [match for pattern in PATTERNS for match in _matches(batch.column("text"), pattern)]
        if matches:
            row, text = min(matches)
            yield (
                f"{table.location(start + row)} contains {text!r}, which is sampled literally, as text; for negative "
                "prompts, sizes and seeds use columns of a .csv or .jsonl, for LoRAs backbone.loras; weights of words "
                "are not supported"
            )
            return


def _matches(texts: pa.Array, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of the first match, if any; matches across two rows do not count."""
    offsets = offsets_of(texts)
    data = memoryview(texts.buffers()[2] or b"")[offsets[0] : offsets[-1]]
    for match in pattern.finditer(data):
        row = bisect_right(offsets, match.start() + offsets[0]) - 1
        if match.end() + offsets[0] <= offsets[row + 1]:
            yield row, match[0].decode(errors="replace")
            return
