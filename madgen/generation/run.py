"""`madgen generate`: check everything, then run `trainer.predict` over the missing batches."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import lightning
import torch

from madgen.cluster.launch import device_type, lost_process, placement, rank, strategy
from madgen.cluster.signals import exiting_on_signals, request_requeue
from madgen.config.schema import Job, TrainerConfig
from madgen.dataset.foreign_shards import refuse_foreign_shards
from madgen.dataset.manifest import check_writable
from madgen.generation.datamodule import PromptDataModule
from madgen.generation.module import PanoramaModule
from madgen.generation.outcome import COMPLETE, STOPPED, Outcome, finish
from madgen.generation.quiet import quieten
from madgen.generation.upload import check_upload_target, finish_upload
from madgen.generation.writer import ShardWriter
from madgen.monitoring.observer import Observer
from madgen.monitoring.progress import ProgressReport
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.errors import UserError


def generate(run: ResolvedRun) -> Outcome:
    """Generate a dataset, or resume an unfinished one. Raises UserError before anything is written."""
    started = time.monotonic()
    quieten()
    job = run.job
    run = run.on(device_type(job.trainer))
    directory = run.directory
    run.check_directory()
    if not directory.manifest.exists():
        check_writable(directory)
    if rank() == 0 and directory.manifest.exists() and run.weights_are_local:
        refuse_foreign_shards(directory, run.manifest)
    check_upload_target(run)
    _fix_threads(job.trainer)
    writer = ShardWriter(job, _observers(job))
    trainer, pipeline = build_trainer(job.trainer, [writer], directory.root), writer.pipeline
    data = PromptDataModule(job, run)
    with directory.reporting_disappearance(began=lambda: data.queue.resumes):
        _predict(trainer, job, data, writer)
        if trainer.global_rank == 0 and (writer.signals.preempting or data.queue.out_of_time):
            request_requeue(data.queue.out_of_time or "signal")
        directory.check_there()
        if trainer.global_rank != 0:
            return Outcome(COMPLETE, {}, time.monotonic() - started, pipeline.written)
        with exiting_on_signals("stopped while writing the index; rerun the same command to write it"):
            outcome = finish(data.run, started, pipeline.written, pipeline.tripped)
    if job.output.upload is not None and writer.signals.received is not None:
        return replace(outcome, code=STOPPED)  # a stopped run does not wait for its upload
    return finish_upload(run, outcome)


def _predict(trainer: lightning.Trainer, job: Job, data: PromptDataModule, writer: ShardWriter) -> None:
    try:
        trainer.predict(PanoramaModule(job), datamodule=data, return_predictions=False)
    except RuntimeError as error:
        if (lost := lost_process(error)) is None:
            raise
        request_requeue("lost process")
        raise lost from error
    except (KeyboardInterrupt, SystemExit):  # Lightning ends with status 1 after a second Ctrl-C
        if writer.signals.received is None:
            raise
    finally:
        writer.signals.restore()
    if writer.signals.received or data.queue.out_of_time:  # a batch system would kill ranks that outlive this process
        for process in getattr(trainer.strategy.launcher, "procs", None) or ():
            process.wait()


def _fix_threads(config: TrainerConfig) -> None:
    """Use the same number of threads with any number of devices, because on a CPU it can change the last bits.

    Unless `OMP_NUM_THREADS` is set, Lightning would divide the cores among the processes.
    """
    if device_type(config) == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _observers(job: Job) -> tuple[Observer, ...]:
    if rank() != 0:
        return ()
    if job.monitor.wandb.chosen_mode() == "disabled":
        return (ProgressReport(),)
    from madgen.monitoring.wandb_run import WandbRun

    return (ProgressReport(), WandbRun(job))


def build_trainer(config: TrainerConfig, callbacks: list[lightning.Callback], root: Path) -> lightning.Trainer:
    """Build a trainer that only predicts: no logger, checkpoints, distributed sampler or signal handlers."""
    processes = placement(config)
    devices, visible = processes.devices, torch.cuda.device_count() if device_type(config) == "cuda" else None
    if devices == "auto":
        devices = visible or 1
    if visible is not None and visible < int(devices):
        raise UserError(
            f"{devices} processes on this node, but this one sees {visible} GPUs; under SLURM, request "
            f"--gpus-per-node={devices}, which makes all of them visible to every task"
        )
    try:
        trainer = lightning.Trainer(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=processes.nodes,
            strategy=strategy(config.strategy, int(devices) * processes.nodes),
            plugins=[processes.environment()],
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,  # the sampler switches gradients off itself
            default_root_dir=root,  # unused, but the default is the current directory, which may have been deleted
        )
    except UserError:
        raise
    except (ValueError, RuntimeError, lightning.pytorch.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    # Lightning's SIGTERM handler would wait for all ranks, also for those that the signal has ended.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer
