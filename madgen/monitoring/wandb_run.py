"""Weights & Biases: one run per dataset, logged by one process at a time from the dataset's files.

A separate thread logs, so that a slow or unreachable server costs points, never panoramas. The step of a point is the
number of settled panoramas of the whole dataset and never decreases, so that a run that is killed, requeued and taken
over by another process stays one curve without duplicate points.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from madgen.config.schema import Job, WandbConfig
from madgen.dataset.format import Manifest, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import parse_object
from madgen.dataset.shards.leases import Worker, read_shared
from madgen.monitoring.observer import Observer
from madgen.monitoring.status import Status, settled
from madgen.monitoring.wandb_values import point_of, samples_table, summary, thumbnail
from madgen.types import Record
from madgen.utils.atomic import write_atomically

logger = logging.getLogger(__name__)
LOG_EVERY_S = 5.0
TAKE_OVER_EVERY_S = 20.0
"""Interval at which other processes check whether the one that logs is still alive."""
STOP_S = 20.0
"""Time limit for W&B at the end of a run; the rest stays on disk for `wandb sync`."""
CLAIM = "wandb"


class WandbRun(Observer):
    """Log progress, throughput, quarantine, alerts and previews of a dataset."""

    def __init__(self, job: Job):
        self.job, self.seen = job, 0
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(16)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._patience_s = STOP_S

    def started(self, directory: DatasetDir, worker: Worker, manifest: Manifest) -> None:
        self.log = Log(self.job.monitor.wandb, directory, worker, manifest)
        state = self.log.status.read()  # `wandb.init` takes seconds
        self._do(lambda: self.log.point(state))
        self._thread.start()

    def sample_written(self, record: Record) -> None:
        every = self.job.monitor.preview_every
        if every > 0 and self.seen % every == 0:
            self._do(lambda: self.log.preview(record))
        self.seen += 1

    def tripped(self, why: str) -> None:
        self._do(lambda: self.log.alert("stopped: too many samples fail", why))

    def ending(self, preempted: bool) -> None:
        state = self.log.status.read()  # while this worker's heartbeat still holds its rate
        began = time.monotonic()
        self._do(lambda: self.log.last(state, preempted), patience_s=self._patience_s / 2)
        self._patience_s = max(0.0, self._patience_s - (time.monotonic() - began))

    def stopped(self) -> None:
        end = time.monotonic() + self._patience_s
        self._do(None, patience_s=self._patience_s)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("W&B does not respond; run `wandb sync --append %s` later", self.log.folder)

    def _do(self, task: Callable[[], None] | None, patience_s: float = 0.01) -> None:
        """Queue a task, or drop it if the queue is still full after `patience_s`."""
        with contextlib.suppress(queue.Full):
            self._tasks.put(task, timeout=patience_s if self._thread.is_alive() else 0.01)

    def _work(self) -> None:
        going = True
        try:
            while going:
                try:
                    task = self._tasks.get(timeout=LOG_EVERY_S)
                except queue.Empty:
                    task = self.log.point
                if task is None:
                    going = False
                else:
                    task()
            self.log.close()
        except Exception as error:
            logger.warning("W&B is off: %s", " ".join(str(error).split()))
            while going:  # empty the queue, or its producers wait
                going = self._tasks.get() is not None


class Log:
    """The W&B run, while this process is the one that logs."""

    def __init__(self, config: WandbConfig, directory: DatasetDir, worker: Worker, manifest: Manifest):
        self.config, self.directory, self.worker, self.manifest = config, directory, worker, manifest
        self.status = Status(directory)
        self.run: Any = None
        self._tried = self._logged = -1e9
        self._before = -1
        """Step of the last point that another process logged."""
        self._samples = -1
        self._over = False
        """True if another process has logged the complete dataset."""
        self._previews: list[wandb.Image] = []
        self._dead: set[str] = set()
        self.complete = False

    @property
    def folder(self) -> str:
        return "wandb/latest-run" if self.run is None else str(Path(self.run.dir).parent)

    def point(self, state: dict[str, Any] | None = None) -> None:
        """Log a state; None: the current one of the dataset."""
        if self._is_ours():
            self._log(self.status.read() if state is None else state)

    def last(self, state: dict[str, Any], preempted: bool) -> None:
        """Log the state at the end of this process; `preempted`: the run will be resumed.

        If the dataset is complete, the process that logs may have ended too early to know: wait for its last note.
        """
        deadline = time.monotonic() + STOP_S / 2
        while not self._is_ours(now=True) and state["complete"] and not self._over and time.monotonic() < deadline:
            time.sleep(0.5)
        if self.run is not None:
            if preempted:
                self.run.mark_preempting()
            self._log(state)

    def preview(self, record: Record) -> None:
        """Log a thumbnail with its prompt and scores, together with the next point."""
        if self._is_ours():
            scores = record.metadata.get("scores") or {}
            lines = "".join(
                f"\n{name}: {value:.3g}" for name, value in scores.items() if isinstance(value, float | int)
            )
            caption = f"{record.task.key}: {record.task.prompt.text}{lines}"
            self._previews.append(wandb.Image(thumbnail(record.image_HWC), caption=caption))
            if time.monotonic() - self._logged >= LOG_EVERY_S:
                self.point()

    def alert(self, title: str, text: str) -> None:
        if self._is_ours():
            self.run.alert(title=f"{self.manifest.name} {title}", text=text, level="ERROR")

    def close(self) -> None:
        """Finish the run in this process; log the table and the artifact if the dataset is complete."""
        if self.run is None:
            return
        if self.complete:
            step = max(self._before, self._samples)
            self.run.log({"samples_table": samples_table(self.directory)}, step=step)
            self.run.log_artifact(self._artifact())
        self.run.finish()

    def _is_ours(self, now: bool = False) -> bool:
        if self.run is not None:
            return True
        if not now and time.monotonic() - self._tried < TAKE_OVER_EVERY_S:
            return False
        self._tried = time.monotonic()
        note = read_shared(parse_object, self._note) or {}
        self._over = note.get("complete") is True or not self.directory.work.exists()
        if self._over or not self.worker.claim(CLAIM):
            return False
        before = (read_shared(parse_object, self._note) or note).get("samples", -1)
        self._before = before if type(before) is int else -1
        self.run = open_run(self.config, self.directory, self.manifest)
        self.run.define_metric("samples")
        self.run.define_metric("*", step_metric="samples")
        return True

    @property
    def _note(self) -> Path:
        """File with the last step, for the process that takes over."""
        return self.directory.work / "wandb.json"

    def _log(self, state: dict[str, Any]) -> None:
        self._logged = time.monotonic()
        self.complete = state["complete"]
        for worker in state["workers"]:
            if worker["state"] == "dead" and worker["id"] not in self._dead:
                self._dead.add(worker["id"])
                self.alert(
                    "lost a worker", f"{worker['id']} on {worker['host']} is dead; another worker takes over its shard"
                )
        samples = settled(state)
        if samples > self._before and samples >= self._samples:
            values = point_of(state)
            if self._previews:
                values["preview"], self._previews = self._previews, []
            self.run.log(values, step=samples)
            self.run.summary.update({"samples": state["done"], "quarantined": state["quarantined"]})
            self._samples = samples
        note = {"samples": max(self._before, self._samples), "complete": self.complete}
        with contextlib.suppress(OSError):
            write_atomically(self._note, to_json(note))

    def _artifact(self) -> wandb.Artifact:
        manifest = self.manifest
        here, there = self.directory.root.resolve().as_uri(), manifest.job["output"]["upload"]
        about = {"fingerprint": manifest.fingerprint, "plan": manifest.plan.as_dict(), "upload": there}
        artifact = wandb.Artifact(manifest.name, type="dataset", metadata=about)
        try:
            artifact.add_reference(there or here, checksum=False)
        except (wandb.Error, ValueError):  # W&B needs the store's client, which may not be installed
            artifact.add_reference(here, checksum=False)
        return artifact


def open_run(config: WandbConfig, directory: DatasetDir, manifest: Manifest) -> Any:
    """Open or resume the dataset's run; offline, with a warning, if `online` is requested without an API key."""
    mode = config.chosen_mode()
    if mode == "online" and not has_key():
        logger.warning("no W&B key (`wandb login` or WANDB_API_KEY): logging offline; run `wandb sync` later")
        mode = "offline"
    return wandb.init(
        project=config.project or os.environ.get("WANDB_PROJECT") or "madgen",
        entity=config.entity,
        group=config.group,
        id=config.id or os.environ.get("WANDB_RUN_ID") or run_id(directory, str(manifest.fingerprint)),
        name=os.environ.get("WANDB_NAME") or manifest.name,
        mode=mode,
        resume="allow",
        config={**manifest.job, "fingerprint": manifest.fingerprint, "plan": manifest.plan.as_dict()},
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )


def has_key() -> bool:
    """Return whether this machine has credentials for W&B."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, NetrcParseError):
        return netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    return False


def run_id(directory: DatasetDir, fingerprint: str) -> str:
    """Return the id of the dataset's run, the same after every restart."""
    text = f"{directory.root.resolve()}/{fingerprint}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def log_report(report: Mapping[str, Any], directory: DatasetDir, plots: Sequence[Path]) -> None:
    """Resume the dataset's run and add the scores of an evaluation to its summary, with the plots as images."""
    manifest = directory.read_manifest()
    run = open_run(WandbConfig(**manifest.job["monitor"]["wandb"]), directory, manifest)
    run.summary.update(summary(report))
    if plots:
        run.log({f"scores/{path.stem}": wandb.Image(str(path)) for path in plots})
    run.finish()
