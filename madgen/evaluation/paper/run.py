"""`madgen paper`: generate, evaluate, draw. Each step finds what is there already: the command can be repeated."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from madgen.config.schema import OutputConfig
from madgen.dataset.layout import DatasetDir, to_json
from madgen.evaluation import command as evaluation
from madgen.evaluation.paper import draw
from madgen.evaluation.paper.plan import RUNTIME, Made, Paper, Setting
from madgen.evaluation.reference import generate, make_reference, view_side
from madgen.metrics import against_reference
from madgen.utils.atomic import write_atomically
from madgen.utils.console import say
from madgen.utils.errors import UserError


def run(paper: Paper, folder: Path, device: str = "auto") -> list[Path]:
    """Makes what is missing under `folder`; the files that were drawn. Exits as `generate` where that stops."""
    draw.check_at_hand(paper)
    sets = folder / "sets"
    sets.mkdir(parents=True, exist_ok=True)
    made = [_generated(setting, sets) for setting in paper.settings if not setting.squares]
    made = [_evaluated(entry, paper, device) for entry in made]
    apart = [_squares(setting, made, paper, device) for setting in paper.settings if setting.squares]
    everything = sorted([*made, *apart], key=lambda entry: paper.settings.index(entry.setting))
    target = folder / paper.name
    target.mkdir(exist_ok=True)
    return draw.draw(paper, everything, target, device)


def _generated(setting: Setting, sets: Path) -> Made:
    """The dataset of a setting, finished."""
    target = sets / setting.name
    job = replace(setting.job, output=OutputConfig(dir=str(target), samples_per_shard=8))
    file = target.with_name(f"{target.name}.yaml")
    write_atomically(file, to_json({**job.as_dict(), "name": job.name}, indent=1))
    say(f"{setting.label}{'' if setting.value is None else f' at {setting.value}'}: {target}")
    code = generate(job, file)
    if code not in (0, 4):
        sys.exit(code)
    return Made(setting, DatasetDir(target))


def _evaluated(made: Made, paper: Paper, device: str) -> Made:
    names = [name for name in paper.metrics if name != RUNTIME]
    if RUNTIME in paper.metrics:
        made.extra["runtime (s)"] = runtime(made.directory)
    if paper.draw["kind"] == "tsne" or compared(names):
        side = view_side(made.directory.read_manifest()["job"])
        made.reference = make_reference(made.directory, side, paper.references)
    if names:
        made.report = _report(made.directory, names, paper, device, made.reference or made.directory)
    return made


def _report(
    directory: DatasetDir, names: Sequence[str], paper: Paper, device: str, reference: DatasetDir | None = None
) -> dict[str, Any]:
    """Against a reference, or without one by halves."""
    from madgen.evaluation.report import read_report

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
    return read_report(evaluation.report_folder(request))


def _squares(setting: Setting, made: list[Made], paper: Paper, device: str) -> Made:
    """The reference that the other settings of the group were compared with, as a row of its own."""
    references = [e.reference for e in made if e.reference is not None and e.setting.group == setting.group]
    if not references:
        raise UserError(f"{setting.label}: squares: true needs a setting of its group that is compared with them")
    names = [name for name in paper.metrics if name != RUNTIME]
    return Made(setting, references[0], _report(references[0], names, paper, device))


def compared(names: Sequence[str]) -> list[str]:
    """Those that need a reference."""
    return [name for name in names if name != RUNTIME and against_reference(name)]


def runtime(directory: DatasetDir) -> float:
    """Seconds a panorama, sampling and decoding, median over shards; of the machine that made them."""
    seconds = [
        (sidecar["seconds"]["sample"] + sidecar["seconds"]["decode"]) / sidecar["made"]
        for sidecar in directory.sidecars()
        if sidecar.get("made") and "sample" in sidecar.get("seconds", {})
    ]
    return statistics.median(seconds) if seconds else float("nan")
