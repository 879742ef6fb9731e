"""Reports side by side, as the paper's tables; numbers of different protocols never stand in one column by accident."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from madgen.evaluation.report import heading, value
from madgen.metrics import METRICS
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Row:
    """One report in a table."""

    label: str
    report: Mapping[str, Any]
    apart: bool = False
    """For comparison only, such as the backbone's own squares: neither ranked, nor of the others' protocol."""
    extra: Mapping[str, float] | None = None
    """Further columns, such as the runtime; lower is better."""


def check_protocols(rows: Sequence[Row]) -> None:
    """UserError naming what differs where two rows have numbers of different protocols."""
    if found := list(_mismatches(rows)):
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"numbers of different protocols: {found[0]}{more}; --mixed shows them all the same")


def _mismatches(rows: Sequence[Row]) -> Iterator[str]:
    for name in METRICS:
        having = [row for row in rows if name in row.report["metrics"] and not row.apart]
        for row in having[1:]:
            first, other = (r.report["metrics"][name]["protocol"] for r in (having[0], row))
            for key, (before, after) in differences(first, other).items():
                yield f"{name}: {key} is {before} in {having[0].label}, {after} in {row.label}"


def differences(first: Any, second: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values of every leaf that differs, by its dotted name."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return {} if first == second else {prefix: (first, second)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*first, *second}):
        found |= differences(first.get(key), second.get(key), f"{prefix}.{key}" if prefix else key)
    return found


def table(rows: Sequence[Row], mixed: bool = False) -> str:
    """A table in Markdown: the best of a column bold, the second best underlined. See `check_protocols`."""
    if not mixed:
        check_protocols(rows)
    names = [name for name in METRICS if any(name in row.report["metrics"] for row in rows)]
    heads = {name: next(r.report["metrics"][name] for r in rows if name in r.report["metrics"]) for name in names}
    extras = list(dict.fromkeys(name for row in rows for name in row.extra or {}))
    lines = ["| | " + " | ".join([heading(heads[name]) for name in names] + [f"{name} ↓" for name in extras]) + " |"]
    lines.append("|---" * (1 + len(names) + len(extras)) + "|")
    marks = {name: _marks([_mean(row, name) for row in rows], heads[name]["higher_is_better"]) for name in names}
    marks |= {name: _marks([_extra(row, name) for row in rows], False) for name in extras}
    for at, row in enumerate(rows):
        cells = [marks[name][at].format(_shown(row, name)) for name in names]
        cells += [marks[name][at].format(_shown_extra(row, name)) for name in extras]
        lines.append(f"| {_cell(row.label)} | " + " | ".join(cells) + " |")
    lines += ["", *_notes(rows, heads, mixed)]
    return "\n".join(lines) + "\n"


def _cell(label: str) -> str:
    """A name that the user gave, in a table that is read as it is, too."""
    return " ".join(label.split()).replace("|", "\\|")


def _shown(row: Row, name: str) -> str:
    found = row.report["metrics"].get(name)
    return "–" if found is None else value(found)


def _shown_extra(row: Row, name: str) -> str:
    found = (row.extra or {}).get(name)
    return "–" if found is None else f"{found:.3g}"


def _mean(row: Row, name: str) -> float | None:
    found = row.report["metrics"].get(name)
    return None if row.apart or found is None else found["mean"]


def _extra(row: Row, name: str) -> float | None:
    return None if row.apart else (row.extra or {}).get(name)


def _marks(values: Sequence[float | None], higher: bool) -> list[str]:
    """How each value is set: the best bold, the second best underlined; equals alike."""
    ranked = sorted({v for v in values if v is not None}, reverse=higher)
    if len(ranked) < 2:
        return ["{}"] * len(values)
    return ["**{}**" if v == ranked[0] else "<u>{}</u>" if v == ranked[1] else "{}" for v in values]


def _notes(rows: Sequence[Row], heads: Mapping[str, Any], mixed: bool) -> list[str]:
    networks: dict[str, list[str]] = {}
    for found in heads.values():
        networks.setdefault(found["network"], []).append(found["label"])
    seen = "; ".join(f"{', '.join(labels)}: {network}" for network, labels in networks.items())
    notes = [f"Seen through {seen}."]
    if mixed and (found := list(_mismatches(rows))):
        notes += ["", "Not of one protocol:", "", *(f"- {text}" for text in found)]
    return notes
