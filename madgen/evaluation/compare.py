"""Compare reports in a table like the paper's, refusing to mix values of different protocols in one column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from madgen.evaluation.report import heading, labels_by_network, value
from madgen.metrics import METRICS
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Row:
    """One report in a table."""

    label: str
    report: Mapping[str, Any]
    apart: bool = False
    """Show for comparison only, such as the backbone's own square images: not ranked, and of another protocol."""
    extra: Mapping[str, float] | None = None
    """Additional columns, such as the runtime; lower is better."""

    def mean(self, name: str) -> float | None:
        """Return the value to rank by, None if the row is not ranked."""
        if self.apart:
            return None
        found = self.report["metrics"].get(name)
        return (self.extra or {}).get(name) if found is None else found["mean"]

    def cell(self, name: str) -> str:
        """Format a value for the table."""
        if name in self.report["metrics"]:
            return value(self.report["metrics"][name])
        return f"{self.extra[name]:.3g}" if self.extra and name in self.extra else "–"


def _mismatches(rows: Sequence[Row]) -> Iterator[str]:
    for name in METRICS:
        having = [row for row in rows if name in row.report["metrics"] and not row.apart]
        for row in having[1:]:
            first, other = (r.report["metrics"][name]["protocol"] for r in (having[0], row))
            for key, (before, after) in differences(first, other).items():
                yield f"{name}: {key} is {before} in {having[0].label}, {after} in {row.label}"


def differences(first: Any, second: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return both values of every leaf that differs, by dotted name."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return {} if first == second else {prefix: (first, second)}
    result: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*first, *second}):
        result |= differences(first.get(key), second.get(key), f"{prefix}.{key}" if prefix else key)
    return result


def table(rows: Sequence[Row], mixed: bool = False) -> str:
    """Return a Markdown table with the best value of a column in bold and the second best underlined.

    Raises UserError for values of different protocols, unless `mixed`.
    """
    mismatches = list(_mismatches(rows))
    if mismatches and not mixed:
        more = f"; and {len(mismatches) - 1} more" if len(mismatches) > 1 else ""
        raise UserError(f"values of different protocols: {mismatches[0]}{more}; use --mixed to show them anyway")
    scores = {name: score for row in reversed(rows) for name, score in row.report["metrics"].items()}
    headings = {name: heading(scores[name]) for name in METRICS if name in scores}
    headings |= {name: f"{name} ↓" for row in rows for name in row.extra or {}}
    lines = ["| | " + " | ".join(headings.values()) + " |", "|---" * (1 + len(headings)) + "|"]
    columns = []
    for name in headings:
        higher_is_better = name in scores and scores[name]["higher_is_better"]
        styles = _styles([row.mean(name) for row in rows], higher_is_better)
        columns.append([style.format(row.cell(name)) for style, row in zip(styles, rows, strict=True)])
    for number, row in enumerate(rows):
        label = " ".join(row.label.split()).replace("|", "\\|")  # the table must also be readable as plain text
        lines.append(f"| {label} | " + " | ".join(column[number] for column in columns) + " |")
    networks = labels_by_network(scores[name] for name in METRICS if name in scores)
    if networks:
        labelled = (f"{network} ({', '.join(labels)})" for network, labels in networks.items())
        lines += ["", f"Networks: {'; '.join(labelled)}."]
    if mismatches:
        lines += ["", "Different protocols:", "", *(f"- {text}" for text in mismatches)]
    return "\n".join(lines) + "\n"


def _styles(values: Sequence[float | None], higher_is_better: bool) -> list[str]:
    """Return a format for each value: bold for the best, underlined for the second best; ties share a style."""
    ranked = sorted({v for v in values if v is not None}, reverse=higher_is_better)
    if len(ranked) < 2:
        return ["{}"] * len(values)
    return ["**{}**" if v == ranked[0] else "<u>{}</u>" if v == ranked[1] else "{}" for v in values]
