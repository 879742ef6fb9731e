"""A report's scores in the W&B run of its dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from madgen.config.schema import WandbConfig
from madgen.dataset.layout import DatasetDir
from madgen.monitoring.wandb_run import open_run


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, deviation and protocol of each metric."""
    found: dict[str, Any] = {}
    for name, score in report["metrics"].items():
        found |= {f"scores/{name}": score["mean"], f"scores/{name}_std": score["std"]}
        found |= {f"scores/{name}_protocol": score["protocol_id"], f"scores/{name}_network": score["network"]}
    return found


def log_report(report: Mapping[str, Any], directory: DatasetDir, plots: Sequence[Path]) -> None:
    """Into the summary of the dataset's run, which is resumed for it, with the plots as pictures."""
    manifest = directory.read_manifest()
    config = WandbConfig(**manifest.job["monitor"]["wandb"])
    run = open_run(config, directory, manifest)
    run.summary.update(summary(report))
    if plots:
        run.log({f"scores/{path.stem}": wandb.Image(str(path)) for path in plots})
    run.finish()
