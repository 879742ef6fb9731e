"""`generate`: check everything, then `trainer.predict` over what is missing."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from madgen import backbones
from madgen.config import Job, TrainerConfig
from madgen.dataset import manifest
from madgen.dataset.claim import remove_work
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.engine.datamodule import PromptDataModule
from madgen.engine.module import PanoramaModule
from madgen.engine.writer import ShardWriter
from madgen.errors import UserError
from madgen.monitor.observer import Observer
from madgen.monitor.progress import ProgressReport
from madgen.monitor.status import status
from madgen.plan.shards import Plan

COMPLETE, STOPPED, QUARANTINED = 0, 3, 4


@dataclass(frozen=True)
class Outcome:
    """How `generate` ended; `code` is the exit status."""

    code: int
    state: dict[str, Any]
    seconds: float
    made_here: int


def generate(job: Job, plan: Plan) -> Outcome:
    """Makes what is missing of a planned dataset; UserError before anything is written if it cannot."""
    started = time.monotonic()
    quieten()
    directory = DatasetDir(job.output_dir)
    _refuse_other_jobs(job, plan, directory)
    if not _joins_a_group() and directory.manifest.exists() and len(directory.done()) == plan.shard_count:
        return _finish(directory, started, 0)
    _fix_threads(job.trainer)
    writer = ShardWriter(job, _observers(job))
    trainer = build_trainer(job.trainer, [writer])
    data = PromptDataModule(job, plan)
    writer.signals.install(data.stop)
    try:
        trainer.predict(PanoramaModule(job), datamodule=data, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):  # Lightning ends with status 1 after a second Ctrl-C
        if writer.signals.received is None:
            raise
    finally:
        writer.signals.restore()
    if trainer.global_rank != 0:
        return Outcome(COMPLETE, {}, time.monotonic() - started, writer.written)
    return _finish(directory, started, writer.written)


def _refuse_other_jobs(job: Job, plan: Plan, directory: DatasetDir) -> None:
    """Before the backbone is loaded; the writer checks again with what was loaded."""
    content = None
    if directory.manifest.exists() and manifest.at_hand(job):
        device_type = "cuda" if _on_gpu(job.trainer) else "cpu"
        content = manifest.build(job, plan, device_type)
    manifest.check_directory(directory, content, job.output.resume)


def _on_gpu(config: TrainerConfig) -> bool:
    return config.accelerator != "cpu" and torch.cuda.is_available()


def _joins_a_group() -> bool:
    """Whether other processes wait for this one to join them, even if nothing is left to do."""
    return "LOCAL_RANK" in os.environ or (SLURMEnvironment.detect() and os.environ.get("SLURM_NTASKS", "1") != "1")


def _fix_threads(config: TrainerConfig) -> None:
    """On a CPU the number of threads can change the last bit, and so the bytes: the same with any number of devices.

    `OMP_NUM_THREADS` chooses it; left alone, Lightning would divide the cores among the processes.
    """
    if not _on_gpu(config):
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _observers(job: Job) -> tuple[Observer, ...]:
    if job.monitor.wandb.mode == "disabled":
        return (ProgressReport(),)
    from madgen.monitor.wandb_run import WandbRun

    return (ProgressReport(), WandbRun(job))


def build_trainer(config: TrainerConfig, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    """A trainer that only predicts: no logger, no checkpoints, no sampler of its own, no signal handlers of its own."""
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None
    nodes = config.num_nodes
    if nodes == "auto":
        nodes = int(os.environ.get("SLURM_NNODES", "1")) if plugins else 1
    devices = config.devices
    if devices == "auto" and plugins and not _on_gpu(config):
        devices = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    try:
        trainer = lightning.Trainer(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=config.strategy,
            plugins=plugins,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,  # the sampler switches gradients off itself
        )
        for plugin in plugins or []:
            plugin.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        return trainer
    except (ValueError, RuntimeError, lightning.pytorch.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def quieten() -> None:
    """Only what concerns the user: warnings of the libraries about their own affairs go to nobody."""
    warnings.filterwarnings("ignore", module=r"(lightning|torch|diffusers|transformers|huggingface_hub)\b.*")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    backbones.quieten()


def _finish(directory: DatasetDir, started: float, made_here: int) -> Outcome:
    """Derived files and clean-up once all shards are there; then the state of the dataset."""
    state = status(directory)
    if state["complete"]:
        write_index(directory)
        remove_work(directory)
    code = STOPPED if not state["complete"] else QUARANTINED if state["quarantined"] else COMPLETE
    return Outcome(code, state, time.monotonic() - started, made_here)


def report(outcome: Outcome, job: Job) -> None:
    """The closing lines: what was made, where it is, what next."""
    if not outcome.state:
        return
    state, out = outcome.state, job.output_dir
    rate = outcome.made_here / outcome.seconds if outcome.seconds > 0 else 0.0
    print(
        f"{state['done']} of {state['planned']} panoramas in {out}/shards; "
        f"{outcome.made_here} made now in {outcome.seconds:.0f} s ({rate:.2f}/s)",
        file=sys.stderr,
    )
    if outcome.code == STOPPED:
        print("stopped early: run the same command again to continue", file=sys.stderr)
    elif outcome.made_here:
        print(f"look at them: madgen preview {out}      check them: madgen verify {out}", file=sys.stderr)
