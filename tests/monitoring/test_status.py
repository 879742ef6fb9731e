"""`madgen status` with real workers that are stopped, continued and killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from processes import until

from madgen.dataset.format import Manifest, PlanTotals, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_sample
from madgen.dataset.shards.journal import open_samples
from madgen.dataset.shards.leases import LEASE_S
from madgen.monitoring.status import SILENT_S, Status, settled, status
from madgen.monitoring.status_page import page, progress_text
from madgen.utils.console import eta_text


@pytest.fixture
def running(start, job_file):
    """A worker at work on 5000 panoramas."""
    return start("generate", job_file, "prompts.samples_per_prompt=1000")


def test_silent_and_dead_workers_are_reported(running, tmp_path):
    directory = DatasetDir(tmp_path / "out")
    until(directory.manifest.exists)
    reader = Status(directory)

    def worker():
        (found,) = reader.read()["workers"] or [{"state": None, "rate_per_s": None}]
        return found

    until(lambda: worker()["rate_per_s"])
    until(lambda: worker()["state"] == "working")
    state = reader.read()
    assert state["eta_s"] == pytest.approx((5000 - settled(state)) / state["rate_per_s"])
    low, high = until(lambda: reader.read()["eta_interval_s"])
    assert 0 < low < high

    os.kill(running.pid, signal.SIGSTOP)
    until(lambda: "State:\tT" in Path(f"/proc/{running.pid}/status").read_text(encoding="utf-8"), "the worker to stop")
    for heartbeat in directory.workers.glob("*.json"):
        os.utime(heartbeat, 2 * (time.time() - SILENT_S - 1,))
    silent = worker()
    assert silent["state"] == "silent"
    assert SILENT_S <= silent["heartbeat_age_s"] < LEASE_S
    assert reader.read()["rate_per_s"] is None
    assert "silent: " in text(reader.read())

    os.kill(running.pid, signal.SIGCONT)
    until(lambda: worker()["state"] == "working")

    running.kill()
    assert worker()["state"] == "dead"
    assert f"dead: {worker()['id']} on {worker()['host']}" in text(reader.read())


def text(state):
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(page(state))
    return console.export_text()


@pytest.fixture
def fleet(tmp_path):
    """A dataset of 100 panoramas with the heartbeats of workers that make `rates` panoramas a second."""

    def make(rates, **more):
        directory = DatasetDir(tmp_path)
        directory.workers.mkdir(parents=True)
        manifest = Manifest("f", {"name": "job"}, PlanTotals(100, 100, 10, 10, ""))
        directory.manifest.write_bytes(manifest.to_json())
        for index, rate in enumerate(rates):
            beat = {
                "id": f"w{index}", "host": f"[red]node{index}", "boot": "elsewhere", "pid": 1, "process_started": "1",
                "state": "working", "samples": 5, "open": {"job-000000": 3}, "rate_per_s": rate, "rate_error": 0.1,
                "megapixels_per_s": rate, **more,
            }  # fmt: skip
            (directory.workers / f"w{index}.json").write_bytes(to_json(beat))
        return directory

    return make


def test_straggler_is_reported(fleet):
    state = status(fleet([1.0, 1.0, 1.1, 0.4]))
    assert [worker["straggler"] for worker in state["workers"]] == [False, False, False, True]
    assert "slow: w3 on [red]node3" in text(state), "a host's name is no markup"


def test_rates_add_up_and_errors_in_quadrature(fleet):
    state = status(fleet([2.0] * 4))
    assert (state["rate_per_s"], state["in_flight"]) == (8.0, 12)
    assert state["eta_s"] == (100 - 12) / 8
    relative = (0.05**2 + 0.08**2) ** 0.5  # of four workers at 10 % each, and of what they have in common
    assert state["eta_interval_s"] == pytest.approx([11 / (1 + relative), 11 / (1 - relative)])
    assert progress_text(state) == "8.00 panoramas/s, 11 s left (10 s to 12 s)"


def test_waiting_worker_has_no_rate(fleet):
    state = status(fleet([1.0, 1.0], state="waiting"))
    assert (state["rate_per_s"], state["eta_s"]) == (None, None)


def test_heartbeat_age_is_on_the_file_servers_clock(fleet):
    directory = fleet([1.0, 1.0, 1.0])
    now = time.time()
    for index, age in enumerate((0, 20, 90)):
        os.utime(directory.workers / f"w{index}.json", (now - age, now - age))
    state = status(directory)
    assert [worker["state"] for worker in state["workers"]] == ["working", "silent", "dead"]
    assert (state["rate_per_s"], state["in_flight"]) == (1.0, 6)


def test_shard_marked_for_regeneration_is_not_counted(finished):
    reader = Status(DatasetDir(finished))
    assert (reader.read()["done"], reader.read()["complete"]) == (10, True)
    (finished / "shards/job-000000.json").unlink()
    assert (reader.read()["done"], reader.read()["complete"]) == (7, False)


def test_watch_ends_when_the_dataset_is_complete(finished, madgen):
    (line,) = madgen("status", "out", "--watch", "--json").out.splitlines()
    assert json.loads(line)["complete"]
    assert "10 of 10 panoramas (100.0 %), 4 of 4 shards" in madgen("status", "out", "--watch").out


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "5 s"), (89, "89 s"), (150, "2 min"), (3600, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_durations_as_text(seconds, said):
    assert eta_text(seconds) == said


def test_samples_kept_of_a_stopped_worker_are_shown(start, madgen_here, job_file, tmp_path):
    """After Ctrl-C the heartbeat is gone, but the samples in the open shard are not."""
    process = start("generate", job_file, "prompts.samples_per_prompt=1000", "output.samples_per_shard=1000")
    directory = DatasetDir(tmp_path / "out")
    until(lambda: sum(path.read_bytes().count(b"\n") for path in directory.open_shards.glob("*.jsonl")) >= 2)
    process.send_signal(signal.SIGINT)
    process.wait()
    log = process.output()[1]
    state = status(directory)
    (journal,) = directory.open_shards.glob("*.jsonl")
    assert (state["in_flight"], state["kept"]) == (0, journal.read_bytes().count(b"\n"))
    assert state["kept"] >= 2
    assert f"{state['kept']} kept of stopped workers" in text(state)
    assert f"0 of 5000 panoramas in out/shards, {state['kept']} more in open shards; {state['kept']} generated" in log
    checked = madgen_here("verify", "out")
    assert checked.out.strip() == (
        f"0 of 5000 panoramas present, {state['kept']} more in open shards: incomplete, nothing broken"
    )
    assert checked.code == 3
    assert json.loads(madgen_here("verify", "out", "--json").out)["kept"] == state["kept"]
    assert madgen_here("preview", "out").code == 0
    assert f"{state['kept']:,} in open shards" in (tmp_path / "out/preview.html").read_text(encoding="utf-8")
    (entry, *_) = open_samples(directory)
    assert read_sample(directory, entry.key).image_HWC.shape == (32, 64, 3)
    with journal.open("r+b") as stream:  # damaged samples are not counted
        stream.write(b"?")
    assert json.loads(madgen_here("verify", "out", "--json").out)["kept"] == state["kept"] - 1
