"""The state of a dataset from its files alone, also of a run on another machine."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from madgen.dataset.claim import LEASE_S, Process, read_json
from madgen.dataset.layout import DatasetDir

_counts: dict[Path, tuple[int, int]] = {}


def count_done(directory: DatasetDir) -> int:
    """Samples in finished shards; each sidecar is read once a process."""
    return sum(_samples_in(directory.sidecar(name))[0] for name in directory.done())


def _samples_in(sidecar: Path) -> tuple[int, int]:
    """How many samples a finished shard holds, and how many it has in quarantine."""
    path = sidecar.absolute()
    if path not in _counts:
        content = read_json(path)
        if not isinstance(content, dict) or "samples" not in content:  # damaged: `verify` says so
            return 0, 0
        _counts[path] = len(content["samples"]), len(content["quarantined"])
    return _counts[path]


def made(directory: DatasetDir) -> int:
    """Samples that are settled, in finished shards and in those that workers are writing; never falls meanwhile."""
    beats = _heartbeats(directory)  # before the shards: one that is published in between is counted once
    done = directory.done()
    settled = sum(sum(_samples_in(directory.sidecar(name))) for name in done)
    return settled + sum(_in_flight(beat, done) for beat in beats)


def _in_flight(beat: dict[str, Any], done: set[str]) -> int:
    """Samples in a worker's open shards, without those that it has published since it said so."""
    return sum(samples for shard, samples in beat["open"].items() if shard not in done)


def _heartbeats(directory: DatasetDir) -> list[dict[str, Any]]:
    found = (read_json(path) for path in sorted(directory.workers.glob("*.json")))
    return [content for content in found if content is not None]


def status(directory: DatasetDir) -> dict[str, Any]:
    """What `madgen status --json` prints; rates are panoramas a second, times seconds."""
    manifest = directory.read_manifest()
    beats = _heartbeats(directory)
    finished: set[str] = set()
    done = quarantined = 0
    costs: list[float] = []  # seconds a sample, of each shard; sidecars are large, none is kept
    plan, name = manifest["plan"], manifest["job"]["name"]
    planned_shards = {f"{name}-{index:06d}" for index in range(plan["shards"])}
    for sidecar in directory.sidecars():
        if sidecar["shard"] not in planned_shards:
            continue
        finished.add(sidecar["shard"])
        done += len(sidecar["samples"])
        quarantined += len(sidecar["quarantined"])
        if sidecar["made"]:
            costs.append((sidecar["finished"] - sidecar["started"]) / sidecar["made"])
    planned = plan["samples"]
    workers = [_worker(beat, finished) for beat in beats]
    flying = sum(worker["in_flight"] for worker in workers if worker["state"] != "dead")
    live_rates = [worker["rate_per_s"] for worker in workers if worker["state"] != "dead" and worker["rate_per_s"]]
    rate = sum(live_rates) or None
    left = planned - done - quarantined - flying
    interval = _eta_interval(left, rate, costs)
    return {
        "name": manifest["job"]["name"],
        "fingerprint": manifest["fingerprint"],
        "planned": planned,
        "done": done,
        "in_flight": flying,
        "quarantined": quarantined,
        "shards": {"planned": plan["shards"], "done": len(finished)},
        "rate_per_s": rate,
        "eta_s": left / rate if rate else (0.0 if left <= 0 else None),
        "eta_interval_s": interval,
        "complete": done + quarantined == planned and len(finished) == plan["shards"],
        "workers": workers,
    }


def _worker(content: dict[str, Any], finished: set[str]) -> dict[str, Any]:
    age = time.time() - content["time"]
    process = Process(content["host"], content["boot"], content["pid"], content["process_started"])
    dead = age > LEASE_S or process.is_surely_dead()
    return {
        "id": content["id"],
        "host": content["host"],
        "device": content.get("device"),
        "rank": content.get("rank"),
        "state": "dead" if dead else content["state"],
        "shard": content.get("shard"),
        "samples": content["samples"],
        "in_flight": _in_flight(content, finished),
        "rate_per_s": content["rate_per_s"],
        "heartbeat_age_s": round(max(0.0, age), 1),
    }


def _eta_interval(left: int, rate: float | None, costs: list[float]) -> list[float] | None:
    """Two standard errors around the ETA, from the spread of the finished shards' time a sample."""
    if not rate or len(costs) < 3:
        return None
    relative = 2 * statistics.stdev(costs) / statistics.mean(costs) / math.sqrt(len(costs))
    return [max(0.0, left / rate * (1 - relative)), left / rate * (1 + relative)]


def eta_text(seconds: float) -> str:
    """`2 h 05 min`, `7 min`, `40 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def print_status(state: dict[str, Any], as_json: bool) -> None:
    """For people, or with `as_json` for scripts."""
    if as_json:
        print(json.dumps(state, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    percent = 100 * state["done"] / state["planned"]
    console.print(f"[bold]{state['name']}[/]: {state['done']} of {state['planned']} panoramas ({percent:.1f} %), "
                  f"{state['shards']['done']} of {state['shards']['planned']} shards", highlight=False)  # fmt: skip
    details = [f"{state['in_flight']} in open shards", f"{state['quarantined']} quarantined"]
    if state["rate_per_s"]:
        details.append(f"{state['rate_per_s']:.2f} panoramas/s")
        details.append(f"{eta_text(state['eta_s'])} left")
    if state["eta_interval_s"]:
        details.append("between " + " and ".join(eta_text(seconds) for seconds in state["eta_interval_s"]))
    console.print("complete" if state["complete"] else ", ".join(details), highlight=False)
    if state["workers"]:
        table = Table("worker", "host", "device", "state", "shard", "samples", "rate/s", "heartbeat", box=None)
        for worker in state["workers"]:
            rate = f"{worker['rate_per_s']:.2f}" if worker["rate_per_s"] else "-"
            table.add_row(worker["id"], worker["host"], str(worker["device"]), worker["state"], str(worker["shard"]),
                          str(worker["samples"]), rate, f"{worker['heartbeat_age_s']} s ago")  # fmt: skip
        console.print(table)
