"""Log an evaluation report to the W&B run of its dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from madgen.config.schema import WandbConfig
from madgen.dataset.layout import DatasetDir
from madgen.monitoring.wandb_run import open_run


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean, standard deviation and protocol of each metric."""
    values: dict[str, Any] = {}
    for name, score in report["metrics"].items():
        values |= {f"scores/{name}": score["mean"], f"scores/{name}_std": score["std"]}
        values |= {f"scores/{name}_protocol": score["protocol_id"], f"scores/{name}_network": score["network"]}
    return values


def log_report(report: Mapping[str, Any], directory: DatasetDir, plots: Sequence[Path]) -> None:
    """Resume the dataset's run and add the scores to its summary, with the plots as images."""
    manifest = directory.read_manifest()
    config = WandbConfig(**manifest.job["monitor"]["wandb"])
    run = open_run(config, directory, manifest)
    run.summary.update(summary(report))
    if plots:
        run.log({f"scores/{path.stem}": wandb.Image(str(path)) for path in plots})
    run.finish()
