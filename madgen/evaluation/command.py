"""`madgen evaluate`: finds out the size of the views, makes the reference if there is none, then scores.

Ties metrics to the rest: they read datasets, and know no job, no backbone and no engine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from madgen.dataset.layout import DatasetDir
from madgen.evaluation.reference import make_reference, view_side
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

PER_PROMPT = 500
"""Square pictures a prompt in the paper."""
OFF_BY_DEFAULT = {"demo": ("fd_dinov2", "clip_iqa")}
"""The demo has no DINOv2, and its CLIP has never heard of photos."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None is what fits the dataset."""

    directory: Path
    reference: Path | None = None
    references: int = PER_PROMPT
    metrics: str | None = None
    extractor: str | None = None
    seed: int = 0
    crop: int | None = None
    halves: bool = False
    pairs: int = 1000
    pool: str = "prompts"
    output: Path | None = None
    device: str = "auto"
    batch: int = 8
    plots: bool = True
    wandb: bool = False


def run(request: Request) -> Path | None:
    """Writes the report; its path, or None in a process that only helped. Exits as `generate` where that stops."""
    directory = DatasetDir(request.directory)
    content = directory.read_manifest()
    extractor = request.extractor or ("demo" if content["job"]["backbone"]["pretrained"] == "demo" else "paper")
    names = _metrics(request, extractor)
    if request.plots:
        from madgen.evaluation.plots import pyplot

        pyplot()  # what is not installed is told before anything is computed
    side = request.crop or view_side(content["job"])
    asked = _evaluation(request, directory, names, extractor, side)

    from madgen.evaluation.evaluate import evaluate
    from madgen.metrics import against_reference

    compared = [name for name in names if against_reference(name)]
    if compared and request.pool == "prompts" and not request.halves:
        _refuse_few(directory, compared)
    if asked.reference is None and not request.halves and compared:
        reference = make_reference(directory, side, request.references)
        asked = replace(asked, reference=reference, reference_parts=_parts(reference, report_folder(request)))
    report = evaluate(asked)
    return None if report is None else _publish(request, directory, report)


def _refuse_few(directory: DatasetDir, compared: Sequence[str]) -> None:
    """Before squares are made."""
    from madgen.evaluation.partial_results import prompt_of

    counts = Counter(prompt_of(entry["key"]) for sidecar in directory.sidecars() for entry in sidecar["samples"])
    if counts and min(counts.values()) < 2:
        what = f"{', '.join(compared)} {'need' if len(compared) > 1 else 'needs'} at least 2 pictures of a prompt"
        raise UserError(f"{what}, got {min(counts.values())}: more samples, or one score of all: --pool dataset")


def _metrics(request: Request, extractor: str) -> tuple[str, ...]:
    from madgen.metrics import METRICS, metric

    if request.halves and request.reference:
        raise UserError("--halves compares a dataset with itself: leave --reference out")
    if request.pool not in ("prompts", "dataset"):
        raise UserError(f"--pool must be prompts or dataset, got {request.pool!r}")
    if request.metrics is not None:
        names = [name.strip() for name in request.metrics.split(",") if name.strip()]
        if not names:
            raise UserError(f"--metrics={request.metrics} names none; known: {', '.join(METRICS)}")
        for name in names:
            metric(name)
        return tuple(name for name in METRICS if name in names)
    off = OFF_BY_DEFAULT.get(extractor.partition(",")[0], ("fd_dinov2",))
    return tuple(name for name in METRICS if name not in off)


def _evaluation(
    request: Request,
    directory: DatasetDir,
    names: Sequence[str],
    extractor: str,
    side: int,
) -> Any:
    from madgen import backbones
    from madgen.evaluation.evaluate import Evaluation
    from madgen.evaluation.runner import pick_device
    from madgen.metrics.crops import Crops
    from madgen.metrics.extractors import Extractors, parse

    backbones.quieten()
    reference = None
    if request.reference is not None:
        if request.reference.resolve() == directory.root.resolve():
            raise UserError(f"--reference={request.reference} is the dataset itself; --halves compares it with itself")
        reference = DatasetDir(request.reference)
        reference.read_manifest()
    output = report_folder(request)
    evaluation = Evaluation(
        directory=directory,
        reference=reference,
        metrics=tuple(names),
        networks=Extractors(parse(extractor), pick_device(request.device)),
        crops=Crops(side, request.seed),
        parts=_parts(directory, output),
        reference_parts=_parts(reference or directory, output),
        halves=request.halves,
        pairs=request.pairs,
        pool=request.pool,
        batch=request.batch,
    )
    _ = evaluation.columns  # loads every network: what is missing is told before pictures are made
    return evaluation


def report_folder(request: Request) -> Path:
    """`-o`, or `report/` in the dataset."""
    return request.output or request.directory / "report"


def _parts(directory: DatasetDir, output: Path) -> Path:
    """Partial results stay with their dataset, for other reports, unless nobody may write there."""
    if os.access(directory.root, os.W_OK):
        return directory.root / "report" / "parts"
    return output / f"parts-{directory.root.name}"


def _publish(request: Request, directory: DatasetDir, report: dict[str, Any]) -> Path:
    from madgen.evaluation.plots import plot_prompts, plot_trade_off
    from madgen.evaluation.report import write_report

    folder = report_folder(request)
    path = write_report(report, folder)
    if request.plots:
        if report["pool"] == "prompts":
            plot_prompts(report, folder / "prompts.png")
        plot_trade_off([(report["dataset"]["name"], report)], folder / "trade-off.png")
    if request.wandb:
        from madgen.monitoring.wandb_report import log_report

        log_report(report, directory, sorted(folder.glob("*.png")))
    return path


def _named(text: str) -> tuple[str, str]:
    """The label and the path of `label=PATH`, or of a path, which may hold a sign of equality itself."""
    label, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        return Path(text).name, text
    if not label or not path:
        raise UserError(f"{text!r} is neither a path nor name=PATH")
    return label, path


def compare(labelled: Sequence[str], output: Path | None, mixed: bool) -> str:
    """The table of some reports, `label=PATH` or `PATH`; with its plots beside `output`, if that is given."""
    from madgen.evaluation.compare import Row, table
    from madgen.evaluation.plots import plot_bars, plot_trade_off
    from madgen.evaluation.report import read_report

    rows = []
    for text in labelled:
        label, path = _named(text)
        rows.append(Row(label, read_report(Path(path).expanduser())))
    if len({row.label for row in rows}) != len(rows):
        raise UserError("two reports have one name; write name=PATH")
    written = table(rows, mixed)
    if output is not None:
        write_atomically(output, written.encode())
        reports = [(row.label, row.report) for row in rows]
        plot_bars(reports, output.with_suffix(".png"))
        plot_trade_off(reports, output.with_name(f"{output.stem}-trade-off.png"))
    return written
