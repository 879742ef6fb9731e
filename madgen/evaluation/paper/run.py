"""Run `madgen paper`: generate, evaluate and draw. Finished steps are reused when the command is repeated."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from madgen.config.schema import OutputConfig
from madgen.dataset.format import to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import build_plan
from madgen.evaluation import command as evaluation
from madgen.evaluation.metric_columns import pick_device
from madgen.evaluation.paper import draw
from madgen.evaluation.paper.plan import RUNTIME, Made, Paper, Setting
from madgen.evaluation.reference import generate, make_reference, view_side
from madgen.evaluation.report import read_report
from madgen.metrics import needs_reference
from madgen.metrics.extractors import parse
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)


def run(paper: Paper, folder: Path, device: str = "auto") -> list[Path]:
    """Generate and evaluate what is missing in `folder` and return the drawn files.

    Exits with generate's status if that stops early.
    """
    draw.check_installed(paper)
    parse(paper.extractor)
    pick_device(device)
    for setting in paper.settings:
        build_plan(setting.job)  # report invalid prompts before writing anything
    sets = folder / "sets"
    sets.mkdir(parents=True, exist_ok=True)
    made = [_generate(setting, sets) for setting in paper.settings if not setting.squares]
    made = [_evaluate(entry, paper, device) for entry in made]
    squares = [_squares(setting, made, paper, device) for setting in paper.settings if setting.squares]
    in_order = sorted([*made, *squares], key=lambda entry: paper.settings.index(entry.setting))
    target = folder / paper.name
    target.mkdir(exist_ok=True)
    return draw.draw(paper, in_order, target, device)


def _generate(setting: Setting, sets: Path) -> Made:
    target = sets / setting.name
    job = replace(setting.job, output=OutputConfig(dir=str(target), samples_per_shard=8))
    file = target.with_name(f"{target.name}.yaml")
    write_atomically(file, to_json({**job.as_dict(), "name": job.name}, indent=1))
    logger.info(f"{setting.label}{'' if setting.value is None else f', {setting.value}'}: {target}")
    generate(job, file)
    return Made(setting, DatasetDir(target))


def _evaluate(made: Made, paper: Paper, device: str) -> Made:
    names = [name for name in paper.metrics if name != RUNTIME]
    if RUNTIME in paper.metrics:
        made.extra["runtime (s)"] = runtime(made.directory)
    if paper.draw["kind"] == "tsne" or any(map(needs_reference, names)):
        side = view_side(made.directory.read_manifest().job)
        made.reference = make_reference(made.directory, side, paper.references)
    if names:
        made.report = _report(made.directory, names, paper, device, made.reference or made.directory)
    return made


def _report(
    directory: DatasetDir, names: Sequence[str], paper: Paper, device: str, reference: DatasetDir | None = None
) -> dict[str, Any]:
    """Evaluate against a reference, or one half against the other without."""
    request = evaluation.Request(
        directory.root,
        reference=None if reference is None else reference.root,
        metrics=",".join(names),
        extractor=paper.extractor,
        pool=paper.pool,
        halves=reference is None,
        pairs=paper.pairs,
        output=directory.root / "report" / paper.name,
        device=device,
        plots=False,
    )
    evaluation.run(request)
    return read_report(request.folder)


def _squares(setting: Setting, made: Sequence[Made], paper: Paper, device: str) -> Made:
    """Evaluate the reference of the setting's group as a row of its own."""
    reference = next((e.reference for e in made if e.reference is not None and e.setting.group == setting.group), None)
    if reference is None:
        raise UserError(
            f"{setting.label}: squares: true needs another setting in its group with a metric that has a reference"
        )
    names = [name for name in paper.metrics if name != RUNTIME]
    return Made(setting, reference, _report(reference, names, paper, device))


def runtime(directory: DatasetDir) -> float:
    """Return the median over shards of the seconds to sample and decode a panorama; depends on the machine."""
    seconds = [
        (sidecar.seconds["sample"] + sidecar.seconds["decode"]) / sidecar.made
        for sidecar in directory.sidecars()
        if sidecar.made and "sample" in sidecar.seconds
    ]
    return statistics.median(seconds) if seconds else float("nan")
