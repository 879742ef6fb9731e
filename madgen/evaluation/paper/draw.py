"""Draw the datasets of a paper file as a table, stacked images, lines, or a t-SNE map of crops."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from madgen.dataset.reader import read_entry
from madgen.evaluation.compare import Row, table
from madgen.evaluation.paper.plan import RUNTIME, Made, Paper
from madgen.evaluation.plots import font_with_greek, plot_bars, plot_trade_off, pyplot, save
from madgen.metrics import metric
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

MARGIN, LABEL_HEIGHT, MAX_WIDTH = 6, 22, 1536
"""Pixels."""


def draw(paper: Paper, made: Sequence[Made], folder: Path, device: str = "auto") -> list[Path]:
    """Draw what `draw.kind` selects and return the files; features are computed on `device`."""
    kinds: dict[str, Callable[..., list[Path]]] = {
        "table": _table,
        "pictures": _pictures,
        "lines": _lines,
        "tsne": partial(_tsne, device=device),
    }
    return kinds[paper.draw["kind"]](paper, made, folder)


def check_installed(paper: Paper) -> None:
    """Raise UserError if a package for drawing is missing."""
    if paper.draw["kind"] != "pictures":
        pyplot()
    if paper.draw["kind"] == "tsne" and importlib.util.find_spec("openTSNE") is None:
        raise UserError("a t-SNE map needs openTSNE: pip install 'madgen[eval]'")


def _table(paper: Paper, made: Sequence[Made], folder: Path) -> list[Path]:
    """Write a table with one ranking per group, and its plots."""
    lines = [f"# {paper.title}", ""]
    for group in dict.fromkeys(entry.setting.group for entry in made):
        rows = [
            Row(entry.setting.label, entry.report or {"metrics": {}}, apart=entry.setting.squares, extra=entry.extra)
            for entry in made
            if entry.setting.group == group
        ]
        lines += [f"## {group}", ""] if group else []
        lines += [table(rows), ""]
    lines += [_counts(made), ""]
    path = folder / "table.md"
    write_atomically(path, "\n".join(lines).encode())
    reports = [(_name(entry), entry.report) for entry in made if entry.report is not None]
    plot_bars(reports, folder / "bars.png")
    plotted = plot_trade_off(reports, folder / "trade-off.png")
    return [path, folder / "bars.png", *([folder / "trade-off.png"] if plotted else [])]


def _name(entry: Made) -> str:
    return f"{entry.setting.group} {entry.setting.label}".strip()


def _counts(made: Sequence[Made]) -> str:
    datasets = [(entry.setting, entry.report["dataset"]) for entry in made if entry.report is not None]
    samples = sorted({dataset["samples"] for setting, dataset in datasets if not setting.squares})
    prompts = sorted({dataset["prompts"] for _, dataset in datasets})
    text = f"{' or '.join(map(str, samples))} panoramas per row, {' or '.join(map(str, prompts))} prompts."
    if any(entry.setting.squares for entry in made):
        text += (
            " Squares are the backbone's own images, shown for comparison and not ranked: one half is compared with "
            "the other, and pairs of images take the place of pairs of crops."
        )
    return text


def _pictures(paper: Paper, made: Sequence[Made], folder: Path) -> list[Path]:
    """Stack the first samples of every setting; they share prompts and seeds."""
    count, rows = paper.draw.get("samples", 1), []
    for entry in made:
        samples = islice(entry.directory.entries(), count)
        images = [Image.fromarray(read_entry(entry.directory, sample).image_HWC) for sample in samples]
        rows += [(_name(entry), image) for image in images]
    path = folder / f"{paper.name}.png"
    stacked(rows).save(path)
    return [path]


def stacked(rows: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Stack images, at most 1536 px wide, each below its label."""
    width = min(MAX_WIDTH, max(image.width for _, image in rows))
    fitted = [(label, _fitted(image, width)) for label, image in rows]
    font = ImageFont.truetype(font_with_greek(), size=16)
    height = sum(image.height + LABEL_HEIGHT + MARGIN for _, image in fitted)
    sheet, top = Image.new("RGB", (width + 2 * MARGIN, height), "white"), 0
    pen = ImageDraw.Draw(sheet)
    for label, image in fitted:
        pen.text((MARGIN, top + 2), label, fill="black", font=font)
        sheet.paste(image, (MARGIN, top + LABEL_HEIGHT))
        top += image.height + LABEL_HEIGHT + MARGIN
    return sheet


def _fitted(image: Image.Image, width: int) -> Image.Image:
    scale = min(1.0, width / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)))


def _lines(paper: Paper, made: Sequence[Made], folder: Path) -> list[Path]:
    """Plot one panel per metric over the varied key, one line per setting, and write the values."""
    names = paper.metrics
    _, panels = pyplot().subplots(1, len(names), figsize=(4.5 * len(names), 3.4), squeeze=False)
    numbers = [f"# {paper.title}", "", f"| | {paper.varied} | " + " | ".join(map(_heading, names)) + " |"]
    numbers.append("|---" * (2 + len(names)) + "|")
    for label in dict.fromkeys(entry.setting.label for entry in made):
        line = [entry for entry in made if entry.setting.label == label]
        for axes, name in zip(panels[0], names, strict=True):
            means, errors = zip(*(_value(entry, name) for entry in line), strict=True)
            x = [entry.setting.value for entry in line]
            axes.errorbar(x, means, yerr=errors, marker="o", capsize=3, label=label)
        for entry in line:
            values = [_value(entry, name) for name in names]
            cells = " | ".join(_digits(mean, 4) + (f" ± {_digits(std, 3)}" if std else "") for mean, std in values)
            numbers.append(f"| {label} | {entry.setting.value} | {cells} |")
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_xlabel(f"{paper.varied} (px)" if str(paper.varied).startswith("sampling.") else str(paper.varied))
        axes.set_title(_heading(name) + _network(made, name), fontsize=9)
        axes.legend(fontsize=7)
    save(folder / f"{paper.name}.png")
    write_atomically(folder / "numbers.md", ("\n".join(numbers) + "\n").encode())
    return [folder / f"{paper.name}.png", folder / "numbers.md"]


def _digits(value: float, count: int) -> str:
    """Format with `count` significant digits and without an exponent."""
    return np.format_float_positional(value, precision=count, unique=False, fractional=False, trim="-")


def _heading(name: str) -> str:
    if name == RUNTIME:
        return "seconds per panorama"
    return metric(name).LABEL + (" ×10³" if metric(name).SCALE == 1000 else "")


def _network(made: Sequence[Made], name: str) -> str:
    scores = (entry.report["metrics"].get(name) for entry in made if entry.report)
    score = next(filter(None, scores), None)
    return "" if score is None else f" ({score['network']})"


def _value(entry: Made, name: str) -> tuple[float, float]:
    """Return mean and standard deviation in the scale of the table."""
    if name == RUNTIME:
        return next(iter(entry.extra.values()), math.nan), 0.0
    assert entry.report is not None
    score = entry.report["metrics"][name]
    mean = math.nan if score["mean"] is None else score["mean"] * score["scale"]
    return mean, (score["std"] or 0.0) * score["scale"]


def _tsne(paper: Paper, made: Sequence[Made], folder: Path, device: str) -> list[Path]:
    from madgen.evaluation.paper.tsne import plot_map

    path = folder / f"{paper.name}.png"
    coverage = plot_map(paper, made, path, device)
    write_atomically(folder / "numbers.md", (f"# {paper.title}\n\n{coverage}\n").encode())
    return [path, folder / "numbers.md"]
