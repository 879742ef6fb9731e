"""Write the tables and figures of the coherence study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import coherence_scores as scores
import numpy as np
from coherence_fidelity import Distance
from coherence_settings import GUIDANCE, PROMPTS, Setting

Rows = Mapping[Setting, Sequence[Mapping[str, Any]]]
COLUMNS = {  # headings by score
    "sky": "sky",
    "ground": "ground",
    "horizon": "horizon",
    "time": "time of day",
    "caption": "caption",
    "clip": "demo CLIP",
    "sharpness": "sharpness",
    "variety colour": "variety: colour",
    "variety horizon": "variety: horizon",
    "seam": "seams",
    "last seam": "last seams",
    "own seam": "own last seams",
    "last seam change": "change of last seams",
    "wrap": "wrap",
}
NOTES = """\
Means ± standard error over the panoramas (variety: over the prompts); n panoramas; views = view evaluations per
panorama (without the second pass of classifier-free guidance; a view of the whole canvas is counted by its area).

- **sky, ground, horizon, time of day**: difference between non-overlapping view-sized crops of a panorama; 0 is fully
  coherent. Standard deviation of the mean colours (0..255) of the top and bottom quarter; standard deviation of the
  horizon's height (percent of the rows); pairs of crops with different times of day (percent).
- **caption**: percentage of the prompt's attributes (time of day, ground, horizon) that crops show, judged by the
  nearest drawn scene. Prompts without such attributes do not count.
- **demo CLIP, FD**: 100 times the cosine of crops and prompt by the small CLIP that comes with madgen; 1000 times the
  Fréchet distance of its features between all crops of the setting and square images of one view (for each prompt as
  many as a setting has panoramas). ± is the standard deviation when panoramas are resampled.
- **sharpness**: energy of the brightness at periods below two latent cells, in percent of that of the square images for
  the same prompt (100 is as sharp; not measured in all groups).
- **variety**: standard deviation between the panoramas of a prompt, of mean colours (0..255) and horizon (percent).
- **seams, last seams**: step at every 32nd column (the borders of shifted views), and at the borders of the views of a
  shifted last step, over the step at borders of neighbouring latent cells; 1 is no seam. All settings are measured at
  the same columns. **own last seams**: at the borders of the setting's own last step. **change**: difference to the
  group's first setting, for the same prompts and seeds.
- **wrap**: step from the last column to the first over the mean step between neighbouring columns.
- Vertical images are cropped from top to bottom, so a low spread means that the scene is repeated, not that one scene
  fills the image; seams are measured between rows.
"""


def values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the values of a score for panoramas, or of variety for prompts, without missing ones."""
    if name.startswith("variety "):
        by_prompt: dict[str, list[list[float]]] = defaultdict(list)
        for row in rows:
            by_prompt[row["prompt"]].append(row["summary"])
        kind = name.removeprefix("variety ")
        return [scores.variety(group)[kind] for group in by_prompt.values() if len(group) > 1]
    if name == "colour":
        return [(row["sky"] + row["ground"]) / 2 for row in rows]
    return [row[name] for row in rows if row.get(name) is not None]


def with_change(rows: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add the change of seams against the same prompt and seed in the first setting."""
    of_first = {(row["prompt"], row["seed"]): row["last seam"] for row in first}
    return [
        {**row, "last seam change": None if other is None or rows is first else row["last seam"] - other}
        for row in rows
        for other in [of_first.get((row["prompt"], row["seed"]))]
    ]


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error, NaN for a single number."""
    error = np.std(numbers, ddof=1) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
    return float(np.mean(numbers)), float(error)


def write_report(folder: Path, rows: Rows, steps: int, backbone: str, distances: Mapping[str, Distance]) -> None:
    """Write `report.md` and, if matplotlib is installed, `figure.png`, `pareto.png` and `operators.png`."""
    groups: dict[str, list[Setting]] = defaultdict(list)
    for setting in rows:
        groups[setting.group].append(setting)
    parts = [
        "# Coherence of joint diffusion\n",
        f"Backbone {backbone}. {steps} steps, guidance {GUIDANCE:g}, {len(PROMPTS)} prompts in turn, the same seeds in "
        f"every setting. τ of 50 is scaled to {steps} steps.\n",
        NOTES,
    ]
    for group, members in groups.items():
        parts.append(f"## {group}\n\n{table({setting: rows[setting] for setting in members}, steps, distances)}\n")
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("figures need matplotlib: pip install 'madgen[eval]'")
        return
    matplotlib.use("Agg")
    write_figure(folder / "figure.png", groups, rows)
    if "cost" in groups:
        write_pareto(folder / "pareto.png", [*groups["cost"], *groups["operators"]], rows, distances)
    if "operators" in groups:
        write_operators(folder / "operators.png", groups["operators"], rows)


def table(rows: Rows, steps: int, distances: Mapping[str, Distance]) -> str:
    """Return a Markdown table with one row per setting."""
    lines = [
        "| setting | canvas px | steps, merged | n | views | passes | FD | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    first = next(iter(rows.values()))
    for setting, scored in rows.items():
        scored = with_change(scored, first)
        distance = distances.get(f"{setting.group}: {setting.name}")
        of_steps = f"{setting.own_steps(steps)}, {setting.merged_steps(steps)}"
        head = f"| {setting.name} | {setting.height}x{setting.width} | {of_steps} | {len(scored)} "
        fd = (
            "–" if distance is None else f"{distance[0]:.1f}" + ("" if distance[1] is None else f" ± {distance[1]:.0f}")
        )
        cells = (cell(values(scored, name), digits=2 if "seam" in name or name == "wrap" else 1) for name in COLUMNS)
        lines.append(
            f"{head}| {scored[0]['views']:.0f} | {scored[0]['passes']:.0f} | {fd} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def cell(numbers: Sequence[float], digits: int) -> str:
    """Format `mean ± error`, or a dash."""
    if not numbers:
        return "–"
    mean, error = mean_and_error(numbers)
    return f"{mean:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def write_figure(path: Path, groups: Mapping[str, list[Setting]], rows: Rows) -> None:
    """Plot one panel per group."""
    import matplotlib.pyplot as plt

    panels: dict[str, Callable] = {"tau": _tau, "blocks": _blocks, "methods": _methods, "seams": _seams}
    shown = [group for group in panels if group in groups]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.2), squeeze=False, layout="constrained")
    for axis, group in zip(axes[0], shown, strict=True):
        panels[group](axis, groups[group], rows)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_pareto(path: Path, members: list[Setting], rows: Rows, distances: Mapping[str, Distance]) -> None:
    """Plot coherence and fidelity against UNet passes; settings that no other one beats in both are named."""
    import matplotlib.pyplot as plt

    passes = [rows[setting][0]["passes"] for setting in members]
    spreads = [mean_and_error(values(rows[setting], "colour")) for setting in members]
    fidelity = [distances.get(f"{setting.group}: {setting.name}", (float("nan"), None)) for setting in members]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    labels = {"coherence": "colour spread between crops", "fidelity": "Fréchet distance x 1000 of demo CLIP features"}
    for axis, (name, label), found in zip(axes, labels.items(), (spreads, fidelity), strict=True):
        means = [mean for mean, _ in found]
        errors = [error or 0 for _, error in found]
        axis.errorbar(passes, means, errors, fmt="o", color="lightgray", capsize=2, label="other settings", zorder=1)
        for n in pareto_front(passes, means):
            axis.errorbar(passes[n], means[n], errors[n], marker="o", capsize=3, label=members[n].name, zorder=2)
        axis.set(xlabel="passes over views per panorama", ylabel=label, title=name, xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the points for which no other point is at most as large in both and smaller in one, by cost."""
    order = sorted(
        (cost, value, n) for n, (cost, value) in enumerate(zip(costs, values, strict=True)) if value == value
    )
    front: list[int] = []
    for _, value, n in order:
        if not front or value < values[front[-1]]:
            front.append(n)
    return front


def write_operators(path: Path, members: list[Setting], rows: Rows) -> None:
    """Plot coherence, seams and sharpness of the merge operators, one line per setting."""
    import matplotlib.pyplot as plt

    names = [f"{setting.name} ({rows[setting][0]['passes']:.0f} passes)" for setting in members]
    panels = {
        "colour": "colour spread between crops",
        "seam": "seams (1: none)",
        "sharpness": "sharpness (100: as squares)",
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(13, 0.27 * len(members) + 1), sharey=True, layout="constrained"
    )
    for axis, (score, label) in zip(axes, panels.items(), strict=True):
        means, errors = _series(members, rows, score)
        axis.errorbar(means, names, xerr=errors, fmt="o", capsize=3, color="#33658a")
        axis.set(xlabel=label)
        axis.grid(axis="y", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].axvline(1, color="gray", linewidth=0.8)
    axes[2].axvline(100, color="gray", linewidth=0.8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _series(members: Sequence[Setting], rows: Rows, name: str) -> tuple[list[float], list[float]]:
    pairs = [mean_and_error(values(rows[setting], name) or [float("nan")]) for setting in members]
    return [mean for mean, _ in pairs], [error for _, error in pairs]


def _tau(axis, members, rows) -> None:
    shares = [100 * setting.tau for setting in members]
    for name, label in (("colour", "spread between crops"), ("variety colour", "variety between seeds")):
        means, errors = _series(members, rows, name)
        axis.errorbar(shares, means, errors, marker="o", capsize=3, label=label)
    axis.set(xlabel="merged steps, %", ylabel="colour, standard deviation of 0..255", title="Number of merged steps")
    right = axis.twinx()
    means, errors = _series(members, rows, "caption")
    right.errorbar(shares, means, errors, marker="s", capsize=3, color="gray", linestyle=":", label="caption match")
    right.set(ylabel="caption match, %", ylim=(0, 105))
    right.spines["top"].set_visible(False)
    lines = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axis.set_ylim(bottom=0)
    axis.legend(lines, [line.get_label() for line in lines], frameon=False, loc="lower left")


def _blocks(axis, members, rows) -> None:
    _bars(axis, members, rows, "colour")
    axis.set(xlabel="colour spread between crops", title="Merged blocks, in every step")


def _seams(axis, members, rows) -> None:
    _bars(axis, members, rows, "last seam")
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set(xlabel="step at the last views' borders over neighbouring steps", title="Seams of shifted views")


def _bars(axis, members, rows, name) -> None:
    means, errors = _series(members, rows, name)
    axis.barh([setting.name for setting in members], means, xerr=errors, color="#7aa6c2", capsize=3)
    axis.invert_yaxis()


def _methods(axis, members, rows) -> None:
    for number, setting in enumerate(members):
        mean, error = mean_and_error(values(rows[setting], "colour"))
        views = rows[setting][0]["views"]
        axis.errorbar(views, mean, error, marker="o", capsize=3, label=f"{number + 1}  {setting.name}")
        axis.annotate(str(number + 1), (views, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axis.set(xlabel="view evaluations per panorama", ylabel="colour spread between crops", title="Methods")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0, top=axis.get_ylim()[1] * 2.2)  # space for the legend
    axis.legend(frameon=False, fontsize=7, loc="upper left")
