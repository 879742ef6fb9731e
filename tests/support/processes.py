"""Run the command line in other processes: forks of a server that has imported everything, or new interpreters."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from forks import WAIT_S, Fork

MADGEN = "from madgen.cli.app import main; main()"
NEARLY_OVER = f"""
from madgen.cluster.walltime import Walltime
record = Walltime.record
def record_the_last(self, cost, seconds):
    record(self, cost, seconds)
    self.clock = lambda: self.end - 5
Walltime.record = record_the_last
{MADGEN}"""
"""`madgen` in a job whose time is nearly over once the first batch is measured."""
ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
READ_AT_IMPORT = ("OMP_", "HF_", "HUGGING_FACE_", "CXX", "TORCHINDUCTOR_")


def until(true: Callable[[], T], what: str = "", every_s: float = 0.02) -> T:
    """Return the first true value of `true()`; fail after ten minutes, which no machine should need."""
    deadline = time.monotonic() + WAIT_S
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what or true}"
        time.sleep(every_s)
    return value


def environment(**extra: str | None) -> dict[str, str]:
    """Return this process's environment without W&B and SLURM variables; None removes a variable."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    merged = {**keep, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}
    return {name: value for name, value in merged.items() if value is not None}


class Started(ABC):
    """A running `madgen ARGUMENTS` in `folder`; its output goes to files, so no pipe can fill up."""

    pid: int

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="madgen-test-")
        self.streams = [Path(self._folder.name) / name for name in ("out", "err")]
        for path in self.streams:
            path.touch()

    def output(self) -> tuple[str, str]:
        """Return stdout and stderr so far."""
        out, err = (path.read_text(encoding="utf-8") for path in self.streams)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process with SIGKILL, also a stopped one."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait()

    @abstractmethod
    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while the process runs."""

    @abstractmethod
    def wait(self, timeout: float = WAIT_S) -> int:
        """Wait for the exit status and return it."""


class Forked(Started):
    """A fork, which has no imports to do; it runs the Python code `program`, by default `madgen`."""

    def __init__(self, arguments: tuple[object, ...], folder: Path, env: dict[str, str], program: str = MADGEN):
        super().__init__()
        self._process = Fork(_run, ["madgen", *map(str, arguments)], folder, env, self.streams, program)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float = WAIT_S) -> int:
        status = self._process.wait(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("madgen", timeout, *self.output())
        return status


class Interpreter(Started):
    """A new interpreter: for variables that are read at import."""

    def __init__(self, arguments: tuple[object, ...], folder: Path, env: dict[str, str]):
        super().__init__()
        command = [sys.executable, "-m", "madgen", *map(str, arguments)]
        with self.streams[0].open("w") as out, self.streams[1].open("w") as err:
            self._process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float = WAIT_S) -> int:
        return self._process.wait(timeout)


def begin(arguments: tuple[object, ...], folder: Path, env: dict[str, str], changed: Iterable[str] = ()) -> Started:
    """Start a fork, or a new interpreter if `changed` variables are read at import."""
    fresh = any(name.startswith(READ_AT_IMPORT) for name in changed)
    return (Interpreter if fresh else Forked)(arguments, folder, env)


def _run(arguments: list[str], folder: Path, env: dict[str, str], streams: list[Path], program: str) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    sys.modules["__main__"].__spec__ = find_spec("madgen.__main__")  # what Lightning starts for the other ranks
    exec(program, {"__name__": "__main__"})
