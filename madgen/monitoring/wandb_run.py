"""Weights & Biases: one run a dataset, logged by one process at a time, from the dataset's files.

Everything happens in a thread of its own: a server that is slow or away costs points, never panoramas. A point's step
is the number of panoramas that are settled in the whole dataset, and no point is behind the last one that was logged,
so that a run which was killed, requeued and taken over by another process is one curve without double points.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from madgen.config.schema import Job, WandbConfig
from madgen.dataset.format import Manifest, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import Worker, read_json
from madgen.monitoring.observer import Observer
from madgen.monitoring.status import Status, settled
from madgen.monitoring.wandb_values import point_of, samples_table, thumbnail
from madgen.types import Record
from madgen.utils.console import say

LOG_EVERY_S = 5.0
TAKE_OVER_EVERY_S = 20.0
"""A process that does not log looks so often whether the one that does is still alive."""
STOP_S = 20.0
"""At the end no longer is waited for W&B; what was not sent stays on disk, for `wandb sync`."""
CLAIM = "wandb"


class WandbRun(Observer):
    """Throughput, progress, trouble and previews of a dataset."""

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
        self._do(lambda: self.log.alert("stopped: too much fails", why))

    def ending(self, preempted: bool) -> None:
        state = self.log.status.read()  # now, while this worker's heartbeat still tells its rate
        began = time.monotonic()
        self._do(lambda: self.log.last(state, preempted), patience_s=self._patience_s / 2)
        self._patience_s = max(0.0, self._patience_s - (time.monotonic() - began))

    def stopped(self) -> None:
        end = time.monotonic() + self._patience_s
        self._do(None, patience_s=self._patience_s)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            say(f"madgen: W&B does not answer; `wandb sync --append {self.log.folder}` sends what is missing later")

    def _do(self, task: Callable[[], None] | None, patience_s: float = 0.01) -> None:
        """Leaves it out where W&B is so slow that others wait already, and still do after `patience_s`."""
        with contextlib.suppress(queue.Full):
            self._tasks.put(task, timeout=patience_s if self._thread.is_alive() else 0.01)

    def _work(self) -> None:
        going = True
        try:
            while going:
                try:
                    task = self._tasks.get(timeout=LOG_EVERY_S)
                except queue.Empty:
                    task = self.log.look
                if task is None:
                    going = False
                else:
                    task()
            self.log.close()
        except Exception as error:
            say(f"madgen: W&B is off: {' '.join(str(error).split())}")
            while going:  # nobody waits for what is not logged
                going = self._tasks.get() is not None


class Log:
    """The run, while this process is the one that logs."""

    def __init__(self, config: WandbConfig, directory: DatasetDir, worker: Worker, manifest: Manifest):
        self.config, self.directory, self.worker, self.manifest = config, directory, worker, manifest
        self.status = Status(directory)
        self.run: Any = None
        self._tried = self._logged = -1e9
        self._before = -1
        """The last point of the process that logged before this one."""
        self._samples = -1
        self._over = False
        """Another process has logged that all is made."""
        self._previews: list[wandb.Image] = []
        self._dead: set[str] = set()
        self.complete = False

    @property
    def folder(self) -> str:
        return "wandb/latest-run" if self.run is None else str(Path(self.run.dir).parent)

    def look(self) -> None:
        """Logs how far the dataset is."""
        if self._is_ours():
            self._log(self.status.read())

    def point(self, state: dict[str, Any]) -> None:
        """Logs a state."""
        if self._is_ours():
            self._log(state)

    def last(self, state: dict[str, Any], preempted: bool) -> None:
        """Logs how far it was when this process ended; a run that is `preempted` is one that goes on later.

        Where all is made, the process that logs may have ended a moment too early to tell: waits for its part's end.
        """
        deadline = time.monotonic() + STOP_S / 2
        while not self._is_ours(now=True) and state["complete"] and not self._over and time.monotonic() < deadline:
            time.sleep(0.5)
        if self.run is not None:
            if preempted:
                self.run.mark_preempting()
            self._log(state)

    def preview(self, record: Record) -> None:
        """A thumbnail with its prompt, and its scores if it has any; logged with the next point."""
        if self._is_ours():
            scores = record.metadata.get("scores") or {}
            told = "".join(f"\n{name}: {value:.3g}" for name, value in scores.items() if isinstance(value, float | int))
            caption = f"{record.task.key}: {record.task.prompt.text}{told}"
            self._previews.append(wandb.Image(thumbnail(record.image_HWC), caption=caption))
            if time.monotonic() - self._logged >= LOG_EVERY_S:
                self.look()

    def alert(self, title: str, text: str) -> None:
        if self._is_ours():
            self.run.alert(title=f"{self.manifest.name} {title}", text=text, level="ERROR")

    def close(self) -> None:
        """Ends this process's part of the run; with the dataset complete, its table and the reference to it."""
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
        note = read_json(self._note) or {"samples": -1, "complete": False}
        self._over = note["complete"] or not self.directory.work.exists()
        if self._over or not self.worker.claim(CLAIM):
            return False
        self._before = (read_json(self._note) or note)["samples"]
        self.run = open_run(self.config, self.directory, self.manifest)
        self.run.define_metric("samples")
        self.run.define_metric("*", step_metric="samples")
        return True

    @property
    def _note(self) -> Path:
        """How far the run's curve has come, for the process that goes on with it."""
        return self.directory.work / "wandb.json"

    def _log(self, state: dict[str, Any]) -> None:
        self._logged = time.monotonic()
        self.complete = state["complete"]
        for worker in state["workers"]:
            if worker["state"] == "dead" and worker["id"] not in self._dead:
                self._dead.add(worker["id"])
                self.alert("lost a worker", f"{worker['id']} on {worker['host']} is dead; others take over its shard")
        samples = settled(state)
        if samples <= self._before or samples < self._samples:
            self._write_note()
            return
        values = point_of(state)
        if self._previews:
            values["preview"], self._previews = self._previews, []
        self.run.log(values, step=samples)
        self.run.summary.update({"samples": state["done"], "quarantined": state["quarantined"]})
        self._samples = samples
        self._write_note()

    def _write_note(self) -> None:
        temporary = self._note.with_name(f".wandb.{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.write_bytes(to_json({"samples": max(self._before, self._samples), "complete": self.complete}))
            os.replace(temporary, self._note)

    def _artifact(self) -> wandb.Artifact:
        manifest = self.manifest
        here, there = self.directory.root.resolve().as_uri(), manifest.job["output"]["upload"]
        about = {"fingerprint": manifest.fingerprint, "plan": manifest.plan.as_dict(), "upload": there}
        artifact = wandb.Artifact(manifest.name, type="dataset", metadata=about)
        try:
            artifact.add_reference(there or here, checksum=False)
        except (wandb.Error, ValueError):  # W&B wants a store's own client, and here may be another
            artifact.add_reference(here, checksum=False)
        return artifact


def open_run(config: WandbConfig, directory: DatasetDir, manifest: Manifest) -> Any:
    """The dataset's run; offline, and said so, where `online` is asked for and there is no key."""
    mode = config.mode
    if mode == "online" and not has_key():
        say("madgen: no W&B key here (`wandb login`, or WANDB_API_KEY): logging offline, for `wandb sync` later")
        mode = "offline"
    return wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        id=config.id or run_id(directory, str(manifest.fingerprint)),
        name=manifest.name,
        mode=mode,
        resume="allow",
        config={**manifest.job, "fingerprint": manifest.fingerprint, "plan": manifest.plan.as_dict()},
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )


def has_key() -> bool:
    """Whether this machine can log in to W&B without asking anybody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def run_id(directory: DatasetDir, fingerprint: str) -> str:
    """One id a dataset: the same after every restart."""
    text = f"{directory.root.resolve()}/{fingerprint}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
