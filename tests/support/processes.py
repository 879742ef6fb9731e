"""The command line in processes of its own: forked from one that has imported everything, or new interpreters."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from forks import WAIT_S, Fork

MADGEN = "from madgen.cli.app import main; main()"
ROOT = Path(__file__).resolve().parents[2]
READ_AT_IMPORT = ("OMP_", "HF_", "HUGGING_FACE_", "CXX", "TORCHINDUCTOR_")


def environment(**extra: str | None) -> dict[str, str]:
    """This process's environment without what would steer a run; None removes a variable."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    merged = {**keep, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}
    return {name: value for name, value in merged.items() if value is not None}


class Started:
    """`madgen ARGUMENTS` in `folder`; what it says goes into files, so that nobody has to read it meanwhile."""

    pid: int

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="madgen-test-")
        self.streams = [Path(self._folder.name) / name for name in ("out", "err")]
        for path in self.streams:
            path.touch()

    def said(self) -> tuple[str, str]:
        """stdout and stderr so far."""
        out, err = (path.read_text() for path in self.streams)
        return out, err

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Also one that stands still; nothing where it has ended."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait()

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        raise NotImplementedError

    def wait(self, timeout: float = WAIT_S) -> int:
        """The exit status."""
        raise NotImplementedError


class Forked(Started):
    """A fork, which has no imports to do; with `program` of that Python code instead of `madgen`."""

    def __init__(self, arguments: tuple[object, ...], folder: Path, env: dict[str, str], program: str = MADGEN):
        super().__init__()
        self._process = Fork(_run, ["madgen", *map(str, arguments)], folder, env, self.streams, program)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float = WAIT_S) -> int:
        status = self._process.wait(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("madgen", timeout, *self.said())
        return status


class Interpreter(Started):
    """A new interpreter, as a user's: for other environment variables, and where it starts others as it was started."""

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
    """A fork, unless variables were `changed` that libraries read when they are imported, or it starts others."""
    fresh = any(name.startswith(READ_AT_IMPORT) for name in changed)
    several = any(str(argument).startswith("trainer.devices=") for argument in arguments)
    return (Interpreter if fresh or several else Forked)(arguments, folder, env)


def _run(arguments: list[str], folder: Path, env: dict[str, str], streams: list[Path], program: str) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    exec(program, {"__name__": "__main__"})
