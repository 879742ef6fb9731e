"""What can be said of a dataset without loading a model: whether a job fits it, and whether nothing is left to do."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from madgen.cluster.launch import placement
from madgen.config.schema import BackboneConfig, Job, TrainerConfig
from madgen.dataset import manifest
from madgen.dataset.index import is_tidy, write_index, write_quarantine
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan, shard_name
from madgen.dataset.shards.leases import remove_work
from madgen.hub.weights import resolve_dtype, resolve_pretrained, single_file
from madgen.monitoring.status import status
from madgen.utils.console import say

COMPLETE, STOPPED, QUARANTINED = 0, 3, 4


@dataclass(frozen=True)
class Outcome:
    """How `generate` ended; `code` is the exit status."""

    code: int
    state: dict[str, Any]
    seconds: float
    made_here: int
    tripped: str | None = None
    """Why the run stopped itself, if it did."""
    unsent: str | None = None
    """Why the upload of a dataset that is made is not complete."""


def finished(job: Job, plan: Plan) -> Outcome | None:
    """The outcome if nothing is left to do; None if there is, or if other processes wait for this one to join them."""
    started, directory = time.monotonic(), DatasetDir(job.output_dir)
    if job.retry is not None or joins_a_group(job.trainer) or not directory.manifest.exists():
        return None
    if not is_complete(directory, plan) or not manifest.at_hand(job, config := described(job.backbone)):
        return None
    there = directory.read_manifest()["identity"]["backbone"]["dtype"]
    dtype = there if job.backbone.dtype == "auto" else job.backbone.dtype  # nothing will be sampled here
    manifest.check_directory(directory, manifest.build(job, plan, dtype, config), job.output.resume)
    return finish(directory, started, 0)


def refuse_other_jobs(job: Job, plan: Plan, directory: DatasetDir) -> None:
    """Before the backbone is loaded; the writer checks again with what was loaded."""
    content, config = None, described(job.backbone)
    if directory.manifest.exists() and (job.retry is not None or manifest.at_hand(job, config)):
        dtype = resolve_dtype(job.backbone.dtype, "cuda" if on_gpu(job.trainer) else "cpu")
        content = manifest.build(job, plan, dtype, config)
    manifest.check_directory(directory, content, job.output.resume)


def described(backbone: BackboneConfig) -> str | None:
    """Whose config files go with a single file; None for models that have their own."""
    if single_file(backbone.pretrained) is None:
        return None  # without the import of diffusers, which tells
    from madgen.hub.model_configs import described_by

    config = backbone.config and resolve_pretrained(backbone.config)
    return described_by(backbone.pretrained, backbone.revision, config)


def on_gpu(config: TrainerConfig) -> bool:
    """Whether the trainer will take a GPU."""
    import torch

    return config.accelerator != "cpu" and torch.cuda.is_available()


def is_complete(directory: DatasetDir, plan: Plan) -> bool:
    """Whether every planned shard is done."""
    return {shard_name(plan.name, index) for index in range(plan.shard_count)} <= directory.done()


def joins_a_group(config: TrainerConfig) -> bool:
    """Whether other processes wait for this one to join them, even if nothing is left to do."""
    return "LOCAL_RANK" in os.environ or placement(config).joins_a_group


def finish(directory: DatasetDir, started: float, made_here: int, tripped: str | None = None) -> Outcome:
    """Derived files and clean-up once all shards are there; then the state of the dataset."""
    state = status(directory)
    if state["quarantined"] or (directory.root / "quarantine.jsonl").exists():
        write_quarantine(directory)
    if state["complete"] and not is_tidy(directory):
        write_index(directory)
        directory.sweep()
        remove_work(directory, lambda: status(directory)["complete"])
    code = STOPPED if not state["complete"] else QUARANTINED if state["quarantined"] else COMPLETE
    return Outcome(code, state, time.monotonic() - started, made_here, tripped)


def report(outcome: Outcome, job: Job) -> None:
    """The closing lines: what was made, where it is, what next."""
    if not outcome.state:
        return
    state, out = outcome.state, job.output_dir
    rate = outcome.made_here / outcome.seconds if outcome.seconds > 0 else 0.0
    say(
        f"{state['done']} of {state['planned']} panoramas in {out}/shards; "
        f"{outcome.made_here} made now in {outcome.seconds:.0f} s ({rate:.2f}/s)"
    )
    if state["quarantined"]:
        again = "" if outcome.tripped else "; to try them again: the same command with retry=quarantined"
        say(f"{state['quarantined']} quarantined, see {out}/quarantine.jsonl{again}")
    if outcome.tripped:
        say(f"madgen: {outcome.tripped}; mend it, then go on with retry=quarantined")
    elif outcome.unsent is not None:
        where = job.output.upload
        say(f"madgen: the upload to {where} is not complete: {outcome.unsent}; the same command goes on with it, "
            f"or madgen push {out} {where}")  # fmt: skip
    elif outcome.code == STOPPED:
        say("stopped early: run the same command again to continue")
    elif outcome.made_here:
        say(f"look at them: madgen preview {out}      check them: madgen verify {out}")
