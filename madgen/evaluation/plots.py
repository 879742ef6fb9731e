"""Plots of reports: bars with error bars, and the trade-off of coherence against FID. The home of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from madgen.evaluation.report import heading
from madgen.metrics import METRICS
from madgen.utils.errors import UserError

DPI = 120
COLUMNS = 4


def pyplot() -> Any:
    """matplotlib without a display; UserError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as loaded
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'madgen[eval]'") from error
    return loaded


def font_with_greek() -> str:
    """The file of the font that comes with matplotlib."""
    pyplot()
    from matplotlib import font_manager

    return font_manager.findfont("DejaVu Sans")


def plot_prompts(report: Mapping[str, Any], path: Path) -> None:
    """A panel a metric: a bar a prompt, and their mean with its deviation."""
    having = {name for name, found in report["metrics"].items() if found["per_prompt"] and found["mean"] is not None}
    names = [name for name in METRICS if name in having]
    labels = list(report["prompts"].values())
    panels = _panels(len(names), height=1.4 + 0.28 * len(labels))
    for axes, name in zip(panels, names, strict=False):
        found = report["metrics"][name]
        values = [_scaled(found["per_prompt"].get(prompt), found) for prompt in report["prompts"]]
        axes.barh(range(len(labels)), values, color="#7aa6c2")
        mean, deviation = _scaled(found["mean"], found), _scaled(found["std"] or 0.0, found)
        axes.errorbar(mean, -1, xerr=deviation, fmt="o", color="#b03a2e", capsize=3)
        axes.set_title(heading(found), fontsize=9)
        shown = [label if len(label) < 34 else label[:32] + "…" for label in labels]
        axes.set_yticks([-1, *range(len(labels))], ["mean ± deviation", *shown], fontsize=7)
        axes.invert_yaxis()
    save(path)


def plot_bars(rows: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """A panel a metric: a bar a report, with the deviation over prompts."""
    names = [name for name in METRICS if any(name in report["metrics"] for _, report in rows)]
    panels = _panels(len(names), height=1.2 + 0.3 * len(rows))
    for axes, name in zip(panels, names, strict=False):
        having = [(label, report["metrics"][name]) for label, report in rows if name in report["metrics"]]
        having = [(label, found) for label, found in having if found["mean"] is not None]
        values = [_scaled(found["mean"], found) for _, found in having]
        errors = [_scaled(found["std"] or 0.0, found) for _, found in having]
        axes.barh(range(len(having)), values, xerr=errors, color="#7aa6c2", error_kw={"capsize": 2, "lw": 0.8})
        axes.set_yticks(range(len(having)), [label for label, _ in having], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(heading(having[0][1]) if having else name, fontsize=9)
    save(path)


def plot_trade_off(rows: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> bool:
    """Coherence against FID, a point a prompt, a large one the mean; False if the reports do not have both."""
    having = [(label, report) for label, report in rows if {"coherence", "fid"} <= set(report["metrics"])]
    having = [(label, report) for label, report in having if report["metrics"]["coherence"]["mean"] is not None]
    if not having:
        return False
    plot = pyplot()
    _, axes = plot.subplots(figsize=(5, 4))
    for label, report in having:
        across, up = report["metrics"]["fid"], report["metrics"]["coherence"]
        prompts = [p for p in report["prompts"] if None not in (across["per_prompt"].get(p), up["per_prompt"].get(p))]
        points = axes.scatter(
            [across["per_prompt"][p] for p in prompts], [up["per_prompt"][p] for p in prompts], s=12, alpha=0.5
        )
        axes.errorbar(
            across["mean"], up["mean"], xerr=across["std"], yerr=up["std"], fmt="o", ms=8, capsize=3,
            color=points.get_facecolor()[0, :3], label=label,
        )  # fmt: skip
    axes.set_xlabel(f"{heading(across)} ({across['network']})", fontsize=8)
    axes.set_ylabel(f"{heading(up)} ({up['network']})", fontsize=8)
    axes.legend(fontsize=7)
    save(path)
    return True


def _panels(count: int, height: float) -> list[Any]:
    columns = min(COLUMNS, max(1, count))
    rows = math.ceil(max(1, count) / columns)
    _, axes = pyplot().subplots(rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False)
    for spare in axes.flat[count:]:
        spare.axis("off")
    return list(axes.flat)


def _scaled(plain: float | None, found: Mapping[str, Any]) -> float:
    return 0.0 if plain is None else plain * found["scale"]


def save(path: Path) -> None:
    """Writes the figure at hand and closes it."""
    plot = pyplot()
    plot.tight_layout()
    plot.savefig(path, dpi=DPI)
    plot.close()
