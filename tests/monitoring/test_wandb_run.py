import json
import queue
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import wandb
from forks import WAIT_S
from processes import MADGEN, NEARLY_OVER, Forked, environment, until
from wandb_log import ended, history, records, run

from madgen.config.schema import Job, WandbConfig
from madgen.dataset.records import parse_object
from madgen.dataset.shards.leases import read_shared


@pytest.fixture
def logged(madgen, job_file, tmp_path):
    result = madgen(
        "generate", job_file, "monitor.wandb.mode=offline", "monitor.preview_every=5", WANDB_DIR=str(tmp_path)
    )
    assert result.code == 0, result.err
    assert "is off" not in result.err
    return sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_offline_log_holds_curve_previews_and_job(logged, tmp_path):
    (log,) = logged
    rows = history(ended(log))
    samples = [row["samples"] for row in rows]
    assert samples == sorted(samples)
    assert rows[-1]["samples"] == 10
    assert rows[-1]["progress"] == 1
    rates = [row["panoramas_per_s"] for row in rows if "panoramas_per_s" in row]
    assert rates
    assert min(rates) > 0
    assert len(samples) == len(set(samples))
    assert sum(row.get("preview/count", 0) for row in rows) == 2  # samples 1 and 6
    captions = [caption for row in rows for caption in row.get("preview/captions", [])]
    assert [caption.split("\n")[0].split(": ")[1] for caption in captions] == [
        "mountains over a meadow at noon 0",
        "mountains over a meadow at noon 2",
    ]
    assert all("\ncoherence: 0." in caption and "\nseam: " in caption for caption in captions)
    assert (rows[-1]["shards_done"], rows[-1]["quarantined"], rows[-1]["workers"]) == (4, 0, 1)
    assert rows[-1]["device/memory_gb"] > 0
    sidecars = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((tmp_path / "out/shards").glob("*.json"))
    ]
    seconds = {name: sum(sidecar["seconds"][name] for sidecar in sidecars) for name in sidecars[0]["seconds"]}
    for name, value in seconds.items():
        assert rows[-1][f"time_share/{name}"] == pytest.approx(value / sum(seconds.values()), abs=1e-3)
    assert rows[-1]["samples_table/nrows"] == 10
    shares = [value for key, value in rows[-1].items() if key.startswith("time_share/")]
    assert sum(shares) == pytest.approx(1)
    config = {item.key: item.value_json for item in run(log).config.update}
    assert '"num_inference_steps":2' in config["sampling"].replace(" ", "")
    assert len(list(log.parent.glob("files/media/images/preview*.png"))) == 2


def test_resumed_dataset_continues_the_run(logged, madgen, job_file, tmp_path):
    (tmp_path / "out/shards/job-000003.json").unlink()
    result = madgen("generate", job_file, "monitor.wandb.mode=offline", WANDB_DIR=str(tmp_path))
    assert result.code == 0, result.err
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({run(log).run_id for log in logs}) == 1
    assert history(ended(logs[-1]))[-1]["samples"] == 10


@pytest.mark.slow
def test_run_at_its_time_limit_is_marked_as_preempting(madgen, job_file, tmp_path):
    options = ["monitor.wandb.mode=offline", "prompts.samples_per_prompt=500", "output.samples_per_shard=1"]
    here = environment(WANDB_DIR=str(tmp_path), MADGEN_END_TIME=str(time.time() + 36000))
    process = Forked(("generate", job_file, *options), tmp_path, here, NEARLY_OVER)
    assert process.wait() == 3, process.output()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert any(record.HasField("preempting") for record in records(ended(log)))


def test_failing_monitor_does_not_stop_a_run(madgen, job_file, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    result = madgen("generate", job_file, "monitor.wandb.mode=offline", WANDB_DIR=str(tmp_path / "file"))
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out/shards").glob("*.json"))) == 4


@pytest.mark.slow
def test_killed_and_resumed_runs_form_one_curve(job_file, tmp_path):
    """Law: over all attempts, no number of samples is logged twice, none is behind one before, the last is all."""
    arguments = ("generate", job_file, "prompts.samples_per_prompt=30", "monitor.wandb.mode=offline")
    often = f"import madgen.monitoring.wandb_run as run; run.LOG_EVERY_S = 0.3; {MADGEN}"
    note = tmp_path.joinpath("out", "work", "wandb.json")

    def start():
        return Forked((*arguments, "monitor.preview_every=1"), tmp_path, environment(WANDB_DIR=str(tmp_path)), often)

    def logs():
        return sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))

    first = start()
    until(lambda: (read_shared(parse_object, note) or {"samples": 0})["samples"] > 0)
    first.kill()
    second = start()
    until(lambda: len(logs()) == 2)  # its log is open, and may not have a point
    second.kill()
    third = start()
    assert third.wait() == 0
    ended(logs()[-1])
    assert len(logs()) == 3, third.output()[1]
    assert len({path.name for path in logs()}) == 1
    samples = [row["samples"] for log in logs() for row in history(log)]
    assert samples == sorted(set(samples))
    assert samples[-1] == 150


def test_online_without_a_key_logs_offline_with_a_warning(madgen, job_file, tmp_path):
    here = {"WANDB_DIR": str(tmp_path), "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    result = madgen("generate", job_file, "monitor.wandb.mode=online", **here)
    assert result.code == 0, result.err
    assert "no W&B key" in result.err
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.slow
def test_unresponsive_server_does_not_delay_the_run(madgen, job_file, tmp_path):
    """A socket that accepts nothing: everything is made, and the end does not wait for long."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        here = {"WANDB_DIR": str(tmp_path), "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        result = madgen("generate", job_file, "monitor.wandb.mode=online", **here)
    assert result.code == 0, result.err
    assert "wandb sync" in result.err or "W&B is off" in result.err
    assert len(list((tmp_path / "out/shards").glob("*.json"))) == 4


def test_wait_for_a_hanging_run_is_limited(monkeypatch):
    """With its queue full: neither the last point nor the end is waited for without limit."""
    from madgen.monitoring import wandb_run

    monkeypatch.setattr(wandb_run, "STOP_S", 0.5)
    hung, released = threading.Event(), threading.Event()

    def hang():
        hung.set()
        released.wait()

    run = wandb_run.WandbRun(Job())
    run.log = SimpleNamespace(folder="wandb/latest-run", status=SimpleNamespace(read=dict), close=lambda: None)
    run._do(hang)
    run._thread.start()
    assert hung.wait(WAIT_S)
    for _ in range(17):
        run._do(hang)
    run.ending(preempted=False)
    run.stopped()
    assert run._thread.is_alive()
    released.set()
    run._do(None, patience_s=WAIT_S)
    run._thread.join(WAIT_S)


@pytest.mark.parametrize("alive", [True, False])
def test_total_wait_is_limited(monkeypatch, alive):
    """For a place for the last point, one for the end, and the end itself; on a clock that only waiting moves."""
    from madgen.monitoring import wandb_run

    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    def full(task, timeout):
        wait(timeout)
        raise queue.Full

    monkeypatch.setattr(wandb_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = wandb_run.WandbRun(Job())
    run.log = SimpleNamespace(folder="wandb/latest-run", status=SimpleNamespace(read=dict))
    run._tasks = SimpleNamespace(put=full)
    run._thread = SimpleNamespace(is_alive=lambda: alive, join=wait)
    run.ending(preempted=False)
    run.stopped()
    assert now[0] == pytest.approx(wandb_run.STOP_S)


def test_failure_at_the_end_does_not_wait(capsys):
    from madgen.monitoring import wandb_run

    def fail():
        raise RuntimeError("no room")

    run = wandb_run.WandbRun(Job())
    run.log = SimpleNamespace(folder="wandb/latest-run", close=fail)
    run._thread.start()
    run.stopped()
    assert capsys.readouterr().err == "madgen: W&B is off: no room\n"


def test_last_point_waits_for_a_full_queue(monkeypatch):
    from madgen.monitoring import wandb_run

    told, go = [], threading.Event()
    run = wandb_run.WandbRun(Job())
    run.log = SimpleNamespace(
        status=SimpleNamespace(read=lambda: "the last state"),
        last=lambda state, preempted: told.append((state, preempted)),
        close=lambda: told.append("closed"),
    )
    hung = threading.Event()
    run._do(lambda: hung.set() or go.wait())
    run._thread.start()
    assert hung.wait(WAIT_S)
    for _ in range(17):
        run._do(go.wait)
    threading.Timer(0.2, go.set).start()
    run.ending(preempted=True)
    run.stopped()
    assert told == [("the last state", True), "closed"]


def test_dead_worker_and_circuit_breaker_raise_alerts(tmp_path, wandb_here):
    from madgen.config.schema import WandbConfig
    from madgen.dataset.format import Manifest, PlanTotals, to_json
    from madgen.dataset.layout import DatasetDir
    from madgen.dataset.shards.leases import Worker
    from madgen.monitoring.wandb_run import Log

    directory = DatasetDir(tmp_path / "out")
    directory.root.mkdir()
    content = Manifest("f", {"name": "job"}, PlanTotals(10, 10, 1, 10, ""))
    directory.manifest.write_bytes(content.to_json())
    worker, other = Worker(directory), Worker(directory)
    for each in (worker, other):
        each.start()
    dead = json.loads(other.heartbeat_file.read_text(encoding="utf-8")) | {"process_started": "of another life"}
    other.close()
    other.heartbeat_file.write_bytes(to_json(dead))
    log = Log(WandbConfig(), directory, worker, content)
    for _ in range(2):
        log.point()
    log.alert("stopped: too many samples fail", "9 of 10")
    log.close()
    worker.close()
    wandb.teardown()  # the file may still be written when a run is finished
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    alerts = [record.alert for record in records(path) if record.HasField("alert")]
    assert [alert.title for alert in alerts] == ["job lost a worker", "job stopped: too many samples fail"]
    assert dead["id"] in alerts[0].text


@pytest.mark.slow
def test_two_jobs_on_one_dataset_log_one_run(start, job_file, tmp_path):
    options = ["prompts.samples_per_prompt=20", "monitor.wandb.mode=offline"]
    both = [start("generate", job_file, *options, WANDB_DIR=str(tmp_path)) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    samples = [row["samples"] for log in logs for row in history(ended(log))]
    assert samples == sorted(set(samples))
    assert samples[-1] == 100


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": ""}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_the_environment_chooses_the_mode_that_the_job_leaves_open(variables, mode):
    assert WandbConfig().chosen_mode(variables) == mode
    assert WandbConfig(mode="online").chosen_mode(variables) == "online"


def test_an_unknown_mode_in_the_environment_is_refused(madgen_here, job_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "maybe")
    result = madgen_here("generate", job_file, "monitor.wandb.mode=null")
    message = "madgen: the environment variable WANDB_MODE must be one of online, offline, disabled, got 'maybe'\n"
    assert (result.code, result.err) == (2, message)
    assert not (tmp_path / "out").exists()


def test_the_environment_names_the_run_where_the_job_does_not(madgen, job_file, tmp_path):
    names = {"WANDB_PROJECT": "zz", "WANDB_NAME": "myname", "WANDB_RUN_GROUP": "g", "WANDB_RUN_ID": "abc"}
    job = ("generate", job_file, "monitor.wandb.mode=null", "prompts.limit=1")
    assert madgen(*job, "monitor.wandb.group=h", WANDB_DIR=str(tmp_path), **names).code == 0
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    logged = run(ended(log))
    assert (logged.project, logged.display_name, logged.run_group, logged.run_id) == ("zz", "myname", "h", "abc")
    assert madgen(*job, "output.dir=quiet", WANDB_DIR=str(tmp_path / "none"), WANDB_MODE="disabled").code == 0
    assert not (tmp_path / "none").exists()
