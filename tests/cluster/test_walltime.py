"""Time limits: no batch starts that cannot end before the job; signals before the first batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import NEARLY_OVER, ROOT, Forked, environment

from madgen.cluster.walltime import MARGIN_S, RECENT, SAFETY, Walltime, job_end


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_every_batch_fits_without_a_time_limit(clock):
    assert Walltime(None, clock).refuses(10**9) is None
    assert Walltime(clock.now - 1, clock).refuses(10**9) is None, "an end in the past is ignored"


@pytest.mark.parametrize("cost", [1, 7, 100])
def test_accepted_batches_end_in_time(clock, cost):
    """Law: a batch that takes what was measured, and the margin, ends before the limit."""
    walltime = Walltime(clock.now + 500, clock)
    started = 0
    while walltime.refuses(cost) is None:
        clock.now += cost * 0.5
        walltime.record(cost, cost * 0.5)
        started += 1
    assert clock.now + MARGIN_S <= walltime.end
    assert started > 0
    assert clock.now + cost * 0.5 * SAFETY + MARGIN_S > walltime.end, "it stopped too early"


def test_expected_duration_grows_with_cost(clock):
    walltime = Walltime(clock.now + 100, clock)
    for _ in range(3):
        walltime.record(10, 10.0)
    assert walltime.refuses(20) is None
    assert "the next batch may take 120 s" in walltime.refuses(100)


def test_first_batch_is_ignored_and_slow_batches_count(clock):
    walltime = Walltime(clock.now + 100, clock)
    walltime.record(1, 60.0)
    assert walltime.expected(1) == 60
    walltime.record(1, 1.0)
    assert walltime.expected(1) == pytest.approx(SAFETY)
    walltime.record(1, 9.0)
    assert walltime.expected(1) == 9
    for _ in range(RECENT):
        walltime.record(1, 1.0)
    assert walltime.expected(1) == pytest.approx(SAFETY)


def test_waiting_ends_before_the_job(clock):
    walltime = Walltime(clock.now + MARGIN_S + 1, clock)
    assert walltime.refuses(0) is None
    clock.now += 2
    assert "no other batch fits" in walltime.refuses(0)


def test_sources_of_the_time_limit(monkeypatch):
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": "12"}) == 12
    assert job_end({"SLURM_JOB_END_TIME": "12", "MADGEN_END_TIME": "34"}) == 34
    assert job_end({"SLURM_JOB_ID": "1", "MADGEN_END_TIME": ""}) is None, "squeue did not answer the batch script"
    monkeypatch.setenv("PATH", "")
    assert job_end({"SLURM_JOB_ID": "1"}) is None


def test_time_limit_from_squeue(monkeypatch, tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 2030-01-02T03:04:05\n", encoding="utf-8")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert job_end({"SLURM_JOB_ID": "7"}) == time.mktime((2030, 1, 2, 3, 4, 5, 0, 0, -1))


@pytest.mark.parametrize("script", ["generate.sbatch", "array.sbatch"])
@pytest.mark.parametrize(
    ("squeue", "end"), [("exit 1", ""), (":", ""), ("echo N/A", ""), ("echo 2030-01-02T03:04:05", "1893553445")]
)
def test_batch_scripts_set_no_end_time_if_squeue_does_not_answer(tmp_path, script, squeue, end):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    lines = (ROOT / "slurm" / script).read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("MADGEN_END_TIME="))
    code = f'set -euo pipefail; job=7\n{line}\necho "$MADGEN_END_TIME"'
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TZ": "UTC"}
    done = subprocess.run(["bash", "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == end


@pytest.mark.slow
def test_generate_stops_in_time(job_file, tmp_path):
    long = ["prompts.samples_per_prompt=200", "output.samples_per_shard=1"]
    note, limit = tmp_path / "note", str(time.time() + 36000)
    here = environment(MADGEN_END_TIME=limit, MADGEN_STOPPED=str(note))
    process = Forked(("generate", job_file, *long), tmp_path, here, NEARLY_OVER)
    assert process.wait() == 3, process.output()
    assert process.output()[1].count("the job's time ends in 5 s") == 1
    assert "the job's time ends" in note.read_text(encoding="utf-8")
    assert list((tmp_path / "out/shards").glob("*.tar"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_during_start_up_stops_early(job_file, tmp_path, number):
    note = tmp_path / "note"
    process = subprocess.Popen(
        [sys.executable, "-m", "madgen", "generate", job_file], cwd=tmp_path,
        env=environment(MADGEN_STOPPED=str(note)), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    caught = 0
    while not caught & 1 << (number - 1):
        assert process.poll() is None
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        time.sleep(0.01)
    process.send_signal(number)
    assert f"{number.name}: stopped; rerun the same command" in process.communicate(timeout=600)[1]
    assert process.returncode == 3
    assert note.exists()
    assert not (tmp_path / "out").exists()
