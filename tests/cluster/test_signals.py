"""Signals to real processes at several moments: exit status 3 and one line, whatever the process is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from forks import WAIT_S
from processes import ROOT, environment, until

STOPPED = "stopped; rerun the same command"


class Group:
    """Start a command in a separate process group, as a shell or a batch system does."""

    def __init__(self, folder, *arguments, **env):
        self.log, self.out = folder / "log", folder / "out"
        with self.log.open("w", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "madgen", *map(str, arguments)], cwd=folder, env=environment(**env),
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def wait(self):
        """Return the exit status, and the lines of the log."""
        status = self.process.wait(WAIT_S)
        return status, self.log.read_text(encoding="utf-8").splitlines()

    def members(self):
        """Return the processes of the group that are alive."""
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (ProcessLookupError, psutil.Error):
                pass
        return alive

    def handles(self, number):
        """Return whether the first process has a handler for a signal."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << (number - 1)

    def kill(self):
        for member in self.members():
            member.kill()
        self.process.wait()


@pytest.fixture
def group(tmp_path):
    """Start a command in a process group that does not outlive the test."""
    started = []

    def begin(*arguments, **env):
        started.append(Group(tmp_path, *arguments, **env))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_signal_during_the_imports_stops_with_one_line(group, job_file, command, number):
    run = group(command, job_file)
    until(lambda: run.handles(signal.SIGTERM))  # the last of its handlers
    run.signal(number)
    assert run.wait() == (3, [f"{number.name}: {STOPPED}"])
    assert not run.out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, lambda run: len(run.members()) == 2),
        (signal.SIGINT, lambda run: len(run.members()) == 2 and all(p.num_threads() > 2 for p in run.members())),
        (signal.SIGTERM, lambda run: (run.out / "dataset.json").exists()),
        (signal.SIGINT, lambda run: list(run.out.glob("work/open/*.tar"))),
    ],
    ids=["second rank starts", "ranks wait for each other", "weights are loaded", "sampling"],
)  # fmt: skip
def test_a_signal_to_two_ranks_stops_both(group, job_file, number, moment):
    job = ("generate", job_file, "sampling.num_inference_steps=40")
    run = group(*job, "trainer.devices=2")
    until(lambda: moment(run) or run.process.poll() is not None)
    run.signal(number)
    status, lines = run.wait()
    assert status == 3, lines
    assert [line for line in lines if "stop" in line], lines
    assert not [line for line in lines if "Traceback" in line or "Error" in line], lines
    until(lambda: not run.members())


@pytest.mark.slow
def test_a_signal_to_rank_0_alone_stops_the_rank_that_it_launched(group, job_file):
    run = group("generate", job_file, "trainer.devices=2")
    until(lambda: len(run.members()) == 2)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == (3, [f"SIGTERM: {STOPPED}"])
    until(lambda: not run.members())


def test_a_signal_in_a_finalizer_stops_too(tmp_path):
    """Python ignores the exception of a handler that runs in `__del__`."""
    script = """
import os, signal, time
from madgen.cluster.signals import exit_on_signals
from madgen.utils.console import log_to_stderr
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
log_to_stderr()
exit_on_signals("stopped")
Finalized()
time.sleep(600)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT)
    assert (result.returncode, result.stderr) == (3, "SIGTERM: stopped\n")
