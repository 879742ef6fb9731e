"""The text output of `madgen status`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from madgen.dataset.layout import DatasetDir
from madgen.monitoring.status import Status
from madgen.utils.console import eta_text, plural, rate_text

REFRESH_S = 2.0


def progress_text(state: dict[str, Any]) -> str:
    """Format throughput, ETA and the number of quarantined samples in a line."""
    parts = []
    if state["rate_per_s"]:
        parts.append(rate_text(state["rate_per_s"]))
        left = f"{eta_text(state['eta_s'])} left"
        low, high = (eta_text(seconds) for seconds in state["eta_interval_s"] or (0, 0))
        parts.append(f"{left} ({low} to {high})" if state["eta_interval_s"] and low != high else left)
    if state["quarantined"]:
        parts.append(f"{state['quarantined']} quarantined")
    return ", ".join(parts)


def page(state: dict[str, Any]) -> Group:
    """Render progress, throughput and every worker."""
    percent, shards = 100 * state["done"] / max(1, state["planned"]), state["shards"]
    progress = f"{state['done']} of {plural(state['planned'], 'panorama')} ({percent:.1f} %)"
    finished = f"{shards['done']} of {plural(shards['planned'], 'shard')}"
    head = Text.assemble((state["name"], "bold"), f": {progress}, {finished}")
    kept = f", {state['kept']} kept of stopped workers" if state["kept"] else ""
    details = [f"{state['in_flight']} in open shards{kept}", f"{state['quarantined']} quarantined"]
    reasons = ", ".join(f"{reason}: {count}" for reason, count in state["quarantined_by_reason"].items())
    details[1] += f" ({reasons})" if reasons else ""
    if rest := progress_text({**state, "quarantined": 0}):
        details.append(rest)
    lines: list[Any] = [head, Text("complete" if state["complete"] else ", ".join(details))]
    if state["workers"]:
        lines.append(_table(state["workers"]))
    return Group(*lines, *(Text(line) for line in _trouble(state["workers"])))


def _table(workers: list[dict[str, Any]]) -> Table:
    table = Table("worker", "host", "device", "state", "shard", "samples", "rate/s", "heartbeat", box=None)
    for worker in workers:
        rate = f"{worker['rate_per_s']:.2f}" if worker["rate_per_s"] else "-"
        state = f"{worker['state']}, slow" if worker["straggler"] else worker["state"]
        row = (worker["id"], worker["host"], worker["device"], state, worker["shard"], worker["samples"], rate)
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row), f"{worker['heartbeat_age_s']} s ago")
    return table


def _trouble(workers: list[dict[str, Any]]) -> list[str]:
    """Return a line for each worker that is dead, silent or slow."""
    lines = []
    for worker in workers:
        where = f"{worker['id']} on {worker['host']}"
        if worker["state"] == "dead":
            lines.append(f"dead: {where}; another worker takes over its shard")
        elif worker["state"] == "silent":
            lines.append(
                f"silent: {where}, no heartbeat for {worker['heartbeat_age_s']:.0f} s: suspended or disconnected"
            )
        elif worker["straggler"]:
            lines.append(f"slow: {where}, at {rate_text(worker['rate_per_s'])}")
    return lines


def print_status(directory: DatasetDir, as_json: bool, watch: bool) -> None:
    """Print the state once, or with `watch` every two seconds until the dataset is complete."""
    states = _states(Status(directory))
    state, console = next(states), Console(highlight=False)
    if as_json:
        print(json.dumps(state, indent=None if watch else 1), flush=True)
        for state in states if watch else ():
            print(json.dumps(state), flush=True)
    elif watch:
        with Live(page(state), console=console, auto_refresh=False) as live:
            for state in states:
                live.update(page(state), refresh=True)
    else:
        console.print(page(state))


def _states(reader: Status) -> Iterator[dict[str, Any]]:
    """Yield the state every two seconds until the dataset is complete."""
    yield (state := reader.read_whole())
    while not state["complete"]:
        time.sleep(REFRESH_S)
        yield (state := reader.read_whole())
