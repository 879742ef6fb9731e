"""Read the state of a dataset from its files alone: samples, rate, ETA and workers, also of runs on other machines."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from madgen.dataset.checks.tar import check_size
from madgen.dataset.format import FormatError
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.journal import count_open_samples
from madgen.dataset.shards.leases import HEARTBEAT_S, LEASE_S, Heartbeat, read_heartbeat
from madgen.utils.atomic import file_system_time

SILENT_S = 2 * HEARTBEAT_S
"""Age of the heartbeat after which a worker is reported as silent; after its lease it counts as dead."""
SLOW = 0.5
"""A worker below this fraction of the median rate is a straggler."""
COMMON_ERROR = 0.08
"""Relative error of the rate that all workers share: in two steady runs the ETA was off by up to 7 % between the first
and the last tenth (`benchmarks/eta.py`)."""


def status(directory: DatasetDir) -> dict[str, Any]:
    """Return what `madgen status --json` prints; rates in panoramas per second, times in seconds.

    Raises UserError if there is no dataset, or one with a damaged sidecar.
    """
    return Status(directory).read_whole()


@dataclass
class Totals:
    """Totals of a finished shard, or of several."""

    samples: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """By reason."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Worker seconds by activity."""

    def add(self, shard: Totals, sign: int = 1) -> None:
        """Add a shard, or with `sign=-1` subtract it."""
        self.samples += sign * shard.samples
        for sums, more in ((self.quarantined, shard.quarantined), (self.seconds, shard.seconds)):
            for name, value in more.items():
                sums[name] += sign * value


class Status:
    """Read the state of a dataset repeatedly, each finished shard only once."""

    def __init__(self, directory: DatasetDir):
        self.directory = directory
        self._planned: set[str] = set()
        self._shards: dict[str, Totals] = {}
        self._totals = Totals()
        self._damaged: FormatError | None = None
        """The error of the first damaged sidecar or tar at the last `read`; its shard is not counted."""

    def read_whole(self) -> dict[str, Any]:
        """Return the current state. Raises UserError if a sidecar is damaged."""
        state = self.read()
        if self._damaged is not None:
            raise self._damaged
        return state

    def read(self) -> dict[str, Any]:
        """Return the current state without damaged shards: a monitor must not end the run."""
        manifest = self.directory.read_manifest()
        # before the shards, or a shard that is published in between is counted twice
        beats = _heartbeats(self.directory)
        now = _now(self.directory) if beats else 0.0
        plan = manifest.plan
        if len(self._planned) != plan.shards:
            self._planned = set(manifest.shard_names())
        done, totals = self._count_shards(), self._totals
        workers = [_worker(*beat, now, done) for beat in beats]
        live = [worker for worker in workers if worker["state"] not in ("dead", "silent")]
        _mark_stragglers(live)
        in_flight = sum(worker["in_flight"] for worker in workers if worker["state"] != "dead")
        open_here = {shard for beat, _ in beats for shard in beat.open}
        kept = count_open_samples(self.directory, done | open_here if in_flight else done)
        quarantined = totals.quarantined.total()
        rate = sum(worker["rate_per_s"] or 0.0 for worker in live) or None
        unpublished = plan.samples - totals.samples - quarantined
        left = unpublished - in_flight - kept
        return {
            "name": manifest.name,
            "fingerprint": manifest.fingerprint,
            "planned": plan.samples,
            "done": totals.samples,
            "in_flight": in_flight,
            "kept": kept,
            "quarantined": quarantined,
            "quarantined_by_reason": dict(sorted(totals.quarantined.items())),
            "shards": {"planned": plan.shards, "done": len(self._shards)},
            "rate_per_s": rate,
            "megapixels_per_s": sum(worker["megapixels_per_s"] or 0.0 for worker in live) or None,
            "eta_s": left / rate if rate else (0.0 if left <= 0 else None),
            "eta_interval_s": _interval(left, rate, live),
            "seconds": {name: round(value, 3) for name, value in sorted(totals.seconds.items())},
            "complete": unpublished == 0 and len(self._shards) == plan.shards,
            "workers": workers,
        }

    def _count_shards(self) -> set[str]:
        """Update the totals of the planned shards that are finished, except damaged ones; return their names."""
        done = self.directory.done() & self._planned
        for name in self._shards.keys() - done:  # marked for regeneration
            self._totals.add(self._shards.pop(name), -1)
        self._damaged = None
        for name in sorted(done - self._shards.keys()):
            try:
                self._shards[name] = _totals(self.directory, name)
            except FileNotFoundError:  # just marked for regeneration
                continue
            except FormatError as error:
                self._damaged = self._damaged or error
                continue
            self._totals.add(self._shards[name])
        return done


def settled(state: dict[str, Any]) -> int:
    """Return the number of samples that are done, in quarantine or in open shards."""
    return min(state["planned"], state["done"] + state["quarantined"] + state["in_flight"])


def _totals(directory: DatasetDir, name: str) -> Totals:
    """Read those of a shard. Raises FormatError if its tar is longer or shorter than its samples."""
    sidecar = directory.read_summary(name)
    with suppress(KeyError, TypeError):  # damaged entries, which `verify` reports
        check_size(directory, name, max((entry["offset"] + entry["size"] for entry in sidecar.samples), default=0))
    reasons = Counter(entry.reason for entry in sidecar.quarantine)
    return Totals(len(sidecar.samples), reasons, Counter(sidecar.seconds))


def _heartbeats(directory: DatasetDir) -> list[tuple[Heartbeat, float]]:
    """Return the readable heartbeats, each with the time when it was written."""
    heartbeats = []
    for path in sorted(directory.workers.glob("*.json")):
        with suppress(FileNotFoundError):  # the worker has just ended
            if (beat := read_heartbeat(path)) is not None:
                heartbeats.append((beat, path.stat().st_mtime))
    return heartbeats


def _now(directory: DatasetDir) -> float:
    """Return the time on the file server's clock, as clocks of machines may differ by more than a lease."""
    with suppress(OSError):  # a read-only dataset
        return file_system_time(directory.workers)
    return time.time()


def _worker(beat: Heartbeat, written: float, now: float, done: set[str]) -> dict[str, Any]:
    age = max(0.0, now - written)
    state = "silent" if age > SILENT_S else beat.state
    if age > LEASE_S or beat.is_surely_dead():
        state = "dead"
    works = state not in ("waiting", "silent", "dead")
    return {
        "id": beat.id,
        "host": beat.host,
        "device": beat.device,
        "rank": beat.rank,
        "state": state,
        "straggler": False,
        "shard": beat.shard,
        "samples": beat.samples,
        "in_flight": sum(samples for shard, samples in beat.open.items() if shard not in done),
        "rate_per_s": beat.rate_per_s if works else None,
        "rate_error": beat.rate_error,
        "megapixels_per_s": beat.megapixels_per_s if works else None,
        "memory_bytes": beat.memory_bytes,
        "heartbeat_age_s": round(age, 1),
    }


def _mark_stragglers(live: list[dict[str, Any]]) -> None:
    """Compare workers by megapixels per second if known, as sizes may differ."""
    rates = {worker["id"]: worker["megapixels_per_s"] or worker["rate_per_s"] for worker in live}
    known = [rate for rate in rates.values() if rate]
    if len(known) >= 3:
        threshold = SLOW * statistics.median(known)
        for worker in live:
            worker["straggler"] = bool(rates[worker["id"]]) and rates[worker["id"]] < threshold


def _interval(left: int, rate: float | None, live: list[dict[str, Any]]) -> list[float] | None:
    """Return the bounds of the ETA, two standard errors of each worker's rate plus the common error."""
    errors = [worker["rate_per_s"] * worker["rate_error"] for worker in live if worker["rate_per_s"]
              and worker["rate_error"] is not None]  # fmt: skip
    if not rate or not errors:
        return None
    relative = min(math.hypot(math.hypot(*errors) / rate, COMMON_ERROR), 0.9)
    return [left / (rate * (1 + relative)), left / (rate * (1 - relative))]
