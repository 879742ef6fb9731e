"""Fork processes from an interpreter that has already imported everything: `python fork_server.py LISTENING_FD PYTHON`.

The imports take about ten seconds, and begin with the first request. The server ends when its standard input does, that
is, with the process that started it. For each connection it forks once, sends the pid, and later the exit status.
A request is a pickled call (`forks.py`), or the JSON object and the streams of a process (`fork_client.py`). PYTHON is
the `sys.executable` of all forks: a program that starts forks in place of interpreters.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from multiprocessing.connection import Connection


def warm_up() -> None:
    """Import all of madgen, and the parts of libraries that are loaded when they are first used."""
    import pandas  # noqa: F401 -- imported by pyarrow for its first table
    import pyarrow.parquet  # noqa: F401
    import rich.progress  # noqa: F401
    import rich.table  # noqa: F401
    import tqdm

    import madgen
    from madgen.sampling.sampler import PanoramaSampler

    tqdm.tqdm.monitor_interval = 0  # no thread: forks would not have it
    os.fsync = lambda descriptor: None  # as in conftest.py
    for module in pkgutil.walk_packages(madgen.__path__, "madgen."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    PanoramaSampler.from_pretrained("demo")
    gc.collect()
    gc.freeze()


def main(listening: int) -> None:
    """Serve until standard input ends."""
    listener = socket.socket(fileno=listening)
    select.select([listener, sys.stdin], [], [])
    warm_up()
    wake, on_child = os.pipe()
    os.set_blocking(on_child, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the tests, which end this
    signal.set_wakeup_fd(on_child)
    running: dict[int, Connection] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin, wake, *running.values()], [], [])
        if sys.stdin in ready:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return
        if wake in ready:
            os.read(wake, 4096)
            reap(running)
        for pid, client in list(running.items()):
            if client in ready:  # clients write no more: this one has ended
                os.kill(pid, signal.SIGKILL)
        if listener in ready:
            client = Connection(listener.accept()[0].detach())
            with contextlib.suppress(EOFError):
                request = client.recv_bytes()
                streams = receive_streams(client) if request.startswith(b"{") else []
                pid = os.fork()
                if pid == 0:
                    for end in (listener, client, *running.values()):
                        end.close()
                    become(request, streams)
                for stream in streams:
                    os.close(stream)
                running[pid] = client
                client.send(pid)


def receive_streams(client: Connection) -> list[int]:
    """Receive the descriptors of a client's standard streams."""
    with socket.socket(fileno=os.dup(client.fileno())) as connection:
        return socket.recv_fds(connection, 16, 3)[1]


def reap(running: dict[int, Connection]) -> None:
    """Send the exit status of every child that has ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            client = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                client.send(os.waitstatus_to_exitcode(status))
            client.close()


def replace(client: int, arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Run `python ARGUMENTS` with what the client process has."""
    for kind in ("uts", "mnt"):  # a node of the local SLURM has other ones
        path = f"/proc/{client}/ns/{kind}"
        if os.path.exists(path) and os.readlink(path) != os.readlink(f"/proc/self/ns/{kind}"):
            namespace = os.open(path, os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
                raise OSError(ctypes.get_errno(), path)
            os.close(namespace)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- perhaps a pipe, which the log is not
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def become(request: bytes, streams: list[int]) -> None:
    """Run the requested function as a process of its own, and exit."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.close()
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.executable = sys.argv[2]
    status = 1
    try:
        if streams:
            replace(**json.loads(request), streams=streams)
        else:
            function, arguments = pickle.loads(request)  # noqa: S301 -- from the tests
            function(*arguments)
        status = 0
    except SystemExit as stopped:
        if stopped.code is None or isinstance(stopped.code, int):
            status = stopped.code or 0
        else:
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined] -- waits for threads, as an interpreter's end does
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
