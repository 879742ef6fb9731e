"""Real processes that need no ten seconds for their imports: forks of a server, which all xdist workers share."""

from __future__ import annotations

import contextlib
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path

HERE = Path(__file__).resolve().parent
ADDRESS = "MADGEN_TEST_FORK_SERVER"
"""Environment variable with the path of the server's socket."""
WAIT_S = 600
_owned: list[object] = []


class Fork:
    """A call of a module's function, `function(*arguments)`, in a process of its own."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        serve()
        self._server = Client(os.environ[ADDRESS], "AF_UNIX")
        self._server.send_bytes(pickle.dumps((function, arguments)))
        try:
            self.pid: int = self._server.recv()
        except (EOFError, ConnectionError) as error:
            log = Path(os.environ[ADDRESS]).with_name("log").read_text(encoding="utf-8")
            raise RuntimeError(f"the fork server has ended:\n{log[-2000:]}") from error
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while the process runs."""
        return self.wait(0)

    def wait(self, timeout: float = WAIT_S) -> int | None:
        """Return the exit status as soon as there is one, or None after `timeout` seconds."""
        if self._status is None and self._server.poll(timeout):
            self._status = self._server.recv()
            self._server.close()
        return self._status

    def kill(self) -> None:
        """End the process with SIGKILL, also a stopped one."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()


def programs() -> Path:
    """Return the folder of the programs `python` and `madgen`, which run in a fork (`fork_client.py`)."""
    serve()
    return Path(os.environ[ADDRESS]).with_name("bin")


def write_programs(folder: Path, address: str) -> Path:
    """Write `python` and `madgen`; return the path of the former."""
    folder.mkdir()
    client = shlex.join([sys.executable, "-I", "-S", str(HERE / "fork_client.py"), address, sys.executable])
    for name, arguments in (("madgen", "-m madgen "), ("python", "")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {client} {arguments}"$@"\n', encoding="utf-8")
        path.chmod(0o755)
    return path


def serve() -> None:
    """Start the server, unless this process or its parent has; it ends with the process that started it."""
    if ADDRESS in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="madgen-forks-")
    address = os.path.join(folder.name, "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    python = write_programs(Path(folder.name, "bin"), address)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "fork_server.py"), str(listener.fileno()), str(python)]
    with open(os.path.join(folder.name, "log"), "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()]
        )
    _owned.extend([folder, server])  # until this process ends
    os.environ[ADDRESS] = address
