"""Plot reports with matplotlib: bars per prompt or report, and coherence against FID."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from madgen.evaluation.report import heading
from madgen.metrics import METRICS
from madgen.utils.errors import UserError

DPI = 120
MAX_LABEL_CHARACTERS = 33
NamedReports = Sequence[tuple[str, Mapping[str, Any]]]


def pyplot() -> Any:
    """Import matplotlib without a display; raise UserError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as loaded
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'madgen[eval]'") from error
    return loaded


def font_with_greek() -> str:
    """Return the path of the font that is bundled with matplotlib."""
    pyplot()
    from matplotlib import font_manager

    return font_manager.findfont("DejaVu Sans")


def plot_prompts(report: Mapping[str, Any], path: Path) -> None:
    """Plot one panel per metric: a bar per prompt, and their mean and standard deviation."""
    scores = [report["metrics"][name] for name in METRICS if name in report["metrics"]]
    scores = [score for score in scores if score["per_prompt"] and score["mean"] is not None]
    labels = [_shortened(text) for text in report["prompts"].values()]
    grid = panels(len(scores), height=1.4 + 0.28 * len(labels))
    for axes, score in zip(grid, scores, strict=False):
        values = [_scaled(score["per_prompt"].get(prompt), score) for prompt in report["prompts"]]
        axes.barh(range(len(labels)), values, color="#7aa6c2")
        mean, deviation = _scaled(score["mean"], score), _scaled(score["std"], score)
        axes.errorbar(mean, -1, xerr=deviation, fmt="o", color="#b03a2e", capsize=3)
        axes.set_title(heading(score), fontsize=9)
        axes.set_yticks([-1, *range(len(labels))], ["mean ± std", *labels], fontsize=7)
        axes.set_ylim(len(labels) - 0.4, -1.6)
    save(path)


def plot_bars(reports: NamedReports, path: Path) -> None:
    """Plot one panel per metric: a bar per report, with the standard deviation over prompts."""
    names = [name for name in METRICS if any(name in report["metrics"] for _, report in reports)]
    grid = panels(len(names), height=1.2 + 0.3 * len(reports))
    for axes, name in zip(grid, names, strict=False):
        scores = {label: report["metrics"][name] for label, report in reports if name in report["metrics"]}
        title = heading(next(iter(scores.values())))
        scores = {label: score for label, score in scores.items() if score["mean"] is not None}
        values = [_scaled(score["mean"], score) for score in scores.values()]
        errors = [_scaled(score["std"], score) for score in scores.values()]
        axes.barh(range(len(scores)), values, xerr=errors, color="#7aa6c2", error_kw={"capsize": 2, "lw": 0.8})
        axes.set_yticks(range(len(scores)), list(scores), fontsize=7)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
    save(path)


def plot_trade_off(reports: NamedReports, path: Path) -> bool:
    """Plot coherence against FID, small points for prompts and a large one for the mean.

    Returns False, without writing a file, if no report has both.
    """
    reports = [(label, report) for label, report in reports if {"coherence", "fid"} <= report["metrics"].keys()]
    reports = [(label, report) for label, report in reports if report["metrics"]["coherence"]["mean"] is not None]
    if not reports:
        return False
    _, axes = pyplot().subplots(figsize=(5, 4))
    for label, report in reports:
        x, y = report["metrics"]["fid"], report["metrics"]["coherence"]
        prompts = [p for p in report["prompts"] if None not in (x["per_prompt"].get(p), y["per_prompt"].get(p))]
        points = axes.scatter(
            [x["per_prompt"][p] for p in prompts], [y["per_prompt"][p] for p in prompts], s=12, alpha=0.5
        )
        axes.errorbar(
            x["mean"], y["mean"], xerr=x["std"], yerr=y["std"], fmt="o", ms=8, capsize=3,
            color=points.get_facecolor()[0, :3], label=label,
        )  # fmt: skip
    axes.set_xlabel(f"{heading(x)} ({x['network']})", fontsize=8)
    axes.set_ylabel(f"{heading(y)} ({y['network']})", fontsize=8)
    axes.set_title("large: mean ± std over prompts, small: prompts", fontsize=8)
    axes.legend(fontsize=7)
    save(path)
    return True


def panels(count: int, height: float, max_columns: int = 4) -> list[Any]:
    """Return the axes of `count` panels in a grid; `height` is that of a panel in inches."""
    columns = min(max_columns, max(1, count))
    rows = math.ceil(max(1, count) / columns)
    _, axes = pyplot().subplots(rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False)
    for unused in axes.flat[count:]:
        unused.axis("off")
    return list(axes.flat)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LABEL_CHARACTERS else text[: MAX_LABEL_CHARACTERS - 1] + "…"


def _scaled(plain: float | None, score: Mapping[str, Any]) -> float:
    return 0.0 if plain is None else plain * score["scale"]


def save(path: Path) -> None:
    """Write the current figure and close it."""
    plot = pyplot()
    plot.tight_layout()
    plot.savefig(path, dpi=DPI)
    plot.close()
