"""What becomes of the datasets of a paper file: a table, pictures under each other, lines, or a map of crops."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from madgen.dataset.reader import read_entry
from madgen.evaluation.compare import Row, table
from madgen.evaluation.paper.plan import RUNTIME, Made, Paper
from madgen.evaluation.plots import font_with_greek, plot_bars, plot_trade_off, pyplot, save
from madgen.metrics import metric
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

MARGIN, WIDEST = 6, 1536
"""Pixels."""


def draw(paper: Paper, made: Sequence[Made], folder: Path, device: str = "auto") -> list[Path]:
    """Writes what `draw.kind` says into a folder, features computed on `device`; the files."""
    kinds: dict[str, Callable[..., list[Path]]] = {
        "table": _table,
        "pictures": _pictures,
        "lines": _lines,
        "tsne": partial(_tsne, device=device),
    }
    return kinds[paper.draw["kind"]](paper, made, folder)


def check_at_hand(paper: Paper) -> None:
    """UserError before anything is made if what draws is not installed."""
    if paper.draw["kind"] != "pictures":
        pyplot()
    if paper.draw["kind"] == "tsne" and importlib.util.find_spec("openTSNE") is None:
        raise UserError("a t-SNE map needs openTSNE: pip install 'madgen[eval]'")


def _table(paper: Paper, made: Sequence[Made], folder: Path) -> list[Path]:
    """A part a group, each ranked for itself; and its plots."""
    lines = [f"# {paper.title}", ""]
    for group in dict.fromkeys(entry.setting.group for entry in made):
        rows = [_row(entry) for entry in made if entry.setting.group == group]
        lines += [f"## {group}", ""] if group else []
        lines += [table(rows), ""]
    lines += [_counts(made), ""]
    path = folder / "table.md"
    write_atomically(path, "\n".join(lines).encode())
    reports = [(_name(entry), entry.report) for entry in made if entry.report is not None]
    plot_bars(reports, folder / "bars.png")
    plotted = plot_trade_off(reports, folder / "trade-off.png")
    return [path, folder / "bars.png", *([folder / "trade-off.png"] if plotted else [])]


def _row(entry: Made) -> Row:
    return Row(entry.setting.label, entry.report or {"metrics": {}}, apart=entry.setting.squares, extra=entry.extra)


def _name(entry: Made) -> str:
    return f"{entry.setting.group} {entry.setting.label}".strip()


def _counts(made: Sequence[Made]) -> str:
    counted = [(entry.setting, entry.report["dataset"]) for entry in made if entry.report is not None]
    samples = sorted({about["samples"] for setting, about in counted if not setting.squares})
    prompts = sorted({about["prompts"] for _, about in counted})
    told = f"{' or '.join(map(str, samples))} panoramas a row, {' or '.join(map(str, prompts))} prompts."
    if any(entry.setting.squares for entry in made):
        told += (
            " Squares are the backbone's own, one half against the other and pairs of pictures in place of pairs of "
        )
        told += "crops: for comparison, not ranked."
    return told


def _pictures(paper: Paper, made: Sequence[Made], folder: Path) -> list[Path]:
    """The first samples of every setting, with its label; of one prompt and seed each."""
    count, rows = int(paper.draw.get("samples", 1)), []
    for entry in made:
        sidecars = [sidecar for sidecar in entry.directory.sidecars() if sidecar["samples"]]
        found = [(sidecar["shard"], sample) for sidecar in sidecars for sample in sidecar["samples"]][:count]
        images = [Image.fromarray(read_entry(entry.directory, *where).image_HWC) for where in found]
        rows += [(_name(entry), image) for image in images]
    path = folder / f"{paper.name}.png"
    stacked(rows).save(path)
    return [path]


def stacked(rows: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures under each other, no wider than 1536 px, each with its label above."""
    width = min(WIDEST, max(image.width for _, image in rows))
    small = [(label, _fitted(image, width)) for label, image in rows]
    font = ImageFont.truetype(font_with_greek(), size=16)
    height = sum(image.height + 22 + MARGIN for _, image in small)
    sheet, top = Image.new("RGB", (width + 2 * MARGIN, height), "white"), 0
    pen = ImageDraw.Draw(sheet)
    for label, image in small:
        pen.text((MARGIN, top + 2), label, fill="black", font=font)
        sheet.paste(image, (MARGIN, top + 22))
        top += image.height + 22 + MARGIN
    return sheet


def _fitted(image: Image.Image, width: int) -> Image.Image:
    share = min(1.0, width / image.width)
    return image.resize((round(image.width * share), round(image.height * share)))


def _lines(paper: Paper, made: Sequence[Made], folder: Path) -> list[Path]:
    """A panel a metric over what varies, a line a setting, with the deviation over prompts; and the numbers."""
    plot, names = pyplot(), paper.metrics
    _, panels = plot.subplots(1, len(names), figsize=(4.5 * len(names), 3.4), squeeze=False)
    numbers = [f"# {paper.title}", "", f"| | {paper.varied} | " + " | ".join(map(_heading, names)) + " |"]
    numbers.append("|---" * (2 + len(names)) + "|")
    for label in dict.fromkeys(entry.setting.label for entry in made):
        line = [entry for entry in made if entry.setting.label == label]
        for axes, name in zip(panels[0], names, strict=True):
            found = [_value(entry, name) for entry in line]
            across = [entry.setting.value for entry in line]
            axes.errorbar(across, [v for v, _ in found], yerr=[e for _, e in found], marker="o", capsize=3, label=label)
        for entry in line:
            found = [_value(entry, name) for name in names]
            cells = " | ".join(_digits(mean, 4) + (f" ± {_digits(std, 3)}" if std else "") for mean, std in found)
            numbers.append(f"| {label} | {entry.setting.value} | {cells} |")
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_xlabel(f"{paper.varied} (px)" if str(paper.varied).startswith("sampling.") else str(paper.varied))
        axes.set_title(_heading(name) + _seen_through(made, name), fontsize=9)
        axes.legend(fontsize=7)
    save(folder / f"{paper.name}.png")
    write_atomically(folder / "numbers.md", ("\n".join(numbers) + "\n").encode())
    return [folder / f"{paper.name}.png", folder / "numbers.md"]


def _digits(value: float, count: int) -> str:
    """So many digits that count, without an exponent."""
    return np.format_float_positional(value, precision=count, unique=False, fractional=False, trim="-")


def _heading(name: str) -> str:
    if name == RUNTIME:
        return "seconds a panorama"
    return metric(name).LABEL + (" ×10³" if metric(name).SCALE == 1000 else "")


def _seen_through(made: Sequence[Made], name: str) -> str:
    found = next((e.report["metrics"][name] for e in made if e.report and name in e.report["metrics"]), None)
    return "" if found is None else f" ({found['network']})"


def _value(entry: Made, name: str) -> tuple[float, float]:
    if name == RUNTIME:
        return next(iter(entry.extra.values()), math.nan), 0.0
    found: dict[str, Any] = (entry.report or {"metrics": {}})["metrics"][name]
    mean = math.nan if found["mean"] is None else found["mean"] * found["scale"]
    return mean, (found["std"] or 0.0) * found["scale"]


def _tsne(paper: Paper, made: Sequence[Made], folder: Path, device: str) -> list[Path]:
    from madgen.evaluation.paper.tsne import plot_map

    path = folder / f"{paper.name}.png"
    shares = plot_map(paper, made, path, device)
    write_atomically(folder / "numbers.md", (f"# {paper.title}\n\n{shares}\n").encode())
    return [path, folder / "numbers.md"]
