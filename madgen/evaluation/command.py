"""The commands `madgen evaluate` and `madgen compare`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madgen.dataset.layout import DatasetDir
from madgen.demo import BACKBONES as DEMO_BACKBONES
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.garbage import collect_usually
from madgen.utils.validation import expand_user

if TYPE_CHECKING:
    from madgen.evaluation.evaluate import Evaluation

OFF_BY_DEFAULT = {"demo": ("fd_dinov2", "clip_iqa")}
"""The demo has no DINOv2, and its CLIP was not trained on CLIP-IQA's texts."""


@dataclass(frozen=True)
class Request:
    """Options of `madgen evaluate`; None selects a default that depends on the dataset."""

    directory: Path
    reference: Path | None = None
    references: int = 500
    """Square reference images per prompt; the paper has 500."""
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

    @property
    def folder(self) -> Path:
        """The report's folder: `-o`, or `report/` in the dataset."""
        return self.output or self.directory / "report"


def run(request: Request) -> Path | None:
    """Evaluate a dataset and return the path of the report, None on ranks other than 0.

    Generates a reference if the metrics need one, and exits with generate's status if that stops early.
    """
    directory = DatasetDir(request.directory)
    manifest = directory.read_manifest()
    if request.plots:
        from madgen.evaluation.plots import pyplot

        pyplot()  # fail before the evaluation if matplotlib is missing
    evaluation = _evaluation(request, directory, manifest.job)

    from madgen.evaluation.evaluate import check_counts, evaluate
    from madgen.evaluation.reference import make_reference

    if evaluation.compared and evaluation.reference is None and not request.halves:
        check_counts(evaluation)
        reference = make_reference(directory, evaluation.crops.side, request.references)
        evaluation = replace(evaluation, reference=reference, reference_parts=_parts(reference, request.folder))
    report = evaluate(evaluation)
    return None if report is None else _publish(request, directory, report)


def _metrics(request: Request, extractor: str) -> tuple[str, ...]:
    from madgen.metrics import METRICS, metric

    if request.metrics is None:
        off = OFF_BY_DEFAULT.get(extractor.partition(",")[0], ("fd_dinov2",))
        return tuple(name for name in METRICS if name not in off)
    names = [name.strip() for name in request.metrics.split(",") if name.strip()]
    if not names:
        raise UserError(f"--metrics={request.metrics} names no metric; known: {', '.join(METRICS)}")
    for name in names:
        metric(name)
    return tuple(name for name in METRICS if name in names)


def _evaluation(request: Request, directory: DatasetDir, job: dict[str, Any]) -> Evaluation:
    if request.halves and request.reference:
        raise UserError("--halves compares a dataset with itself: leave --reference out")
    if request.pool not in ("prompts", "dataset"):
        raise UserError(f"--pool must be prompts or dataset, got {request.pool!r}")
    extractor = request.extractor or ("demo" if job["backbone"]["pretrained"] in DEMO_BACKBONES else "paper")
    metrics = _metrics(request, extractor)

    from madgen import backbones
    from madgen.evaluation.evaluate import Evaluation
    from madgen.evaluation.metric_columns import pick_device
    from madgen.evaluation.reference import view_side
    from madgen.metrics.crops import Crops
    from madgen.metrics.extractors import Extractors, parse

    backbones.silence_model_libraries()
    side = request.crop or view_side(job)
    reference = None
    if request.reference is not None:
        if request.reference.resolve() == directory.root.resolve():
            raise UserError(f"--reference={request.reference} is the dataset itself; use --halves for that comparison")
        reference = DatasetDir(request.reference)
        reference.read_manifest()
    evaluation = Evaluation(
        directory=directory,
        reference=reference,
        metrics=metrics,
        networks=Extractors(parse(extractor), pick_device(request.device)),
        crops=Crops(side, request.seed),
        parts=_parts(directory, request.folder),
        reference_parts=_parts(reference or directory, request.folder),
        halves=request.halves,
        pairs=request.pairs,
        pool=request.pool,
        batch=request.batch,
    )
    _ = evaluation.columns  # load all networks: fail before generating a reference
    collect_usually()
    return evaluation


def _parts(directory: DatasetDir, output: Path) -> Path:
    """Return the folder for a dataset's partial results: in the dataset, or beside the report if it is read-only."""
    if os.access(directory.root, os.W_OK):
        return directory.root / "report" / "parts"
    return output / f"parts-{directory.root.name}"


def _publish(request: Request, directory: DatasetDir, report: dict[str, Any]) -> Path:
    from madgen.evaluation.plots import plot_prompts, plot_trade_off
    from madgen.evaluation.report import write_report

    path = write_report(report, request.folder)
    if request.plots:
        if report["pool"] == "prompts":
            plot_prompts(report, request.folder / "prompts.png")
        plot_trade_off([(report["dataset"]["name"], report)], request.folder / "trade-off.png")
    if request.wandb:
        from madgen.monitoring.wandb_run import log_report

        log_report(report, directory, sorted(request.folder.glob("*.png")))
    return path


def _label_and_path(text: str) -> tuple[str, str]:
    """Split `label=PATH`; an existing path may contain an equals sign."""
    label, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        return Path(text).name, text
    if not label or not path:
        raise UserError(f"{text!r} is neither a path nor name=PATH")
    return label, path


def compare(labelled: Sequence[str], output: Path | None, mixed: bool) -> str:
    """Return a table of reports, given as `label=PATH` or `PATH`; write it and its plots if `output` is given."""
    from madgen.evaluation.compare import Row, table
    from madgen.evaluation.plots import plot_bars, plot_trade_off
    from madgen.evaluation.report import read_report

    paths = [_label_and_path(text) for text in labelled]
    rows = [Row(label, read_report(expand_user(path, "a report"))) for label, path in paths]
    if len({row.label for row in rows}) != len(rows):
        raise UserError("two reports have the same name; write name=PATH")
    text = table(rows, mixed)
    if output is not None:
        write_atomically(output, text.encode())
        reports = [(row.label, row.report) for row in rows]
        plot_bars(reports, output.with_suffix(".png"))
        plot_trade_off(reports, output.with_name(f"{output.stem}-trade-off.png"))
    return text
