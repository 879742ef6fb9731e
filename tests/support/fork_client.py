"""Run `python -m madgen ...` or `python SCRIPT ...` in a fork of the server: `fork_client.py SOCKET PYTHON ARGUMENTS`.

The fork gets this process's arguments, environment, folder, standard streams and namespaces. Signals are forwarded to
it, and it ends with this process, whose exit status is the fork's. PYTHON itself runs what has other arguments.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from multiprocessing.connection import Client

FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


def main(address: str, python: str, arguments: list[str]) -> None:
    """Replace this process by Python, or forward to a fork until that ends."""
    if arguments[:1] == ["-u"]:  # by torchrun
        arguments = arguments[1:]
    is_madgen = arguments[:1] == ["-m"] and arguments[1].partition(".")[0] == "madgen"
    if not (is_madgen or (arguments and arguments[0].endswith(".py"))):
        os.execv(python, [python, *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until the fork is there to get them
    server = Client(address, "AF_UNIX")
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "client": os.getpid()}
    server.send_bytes(json.dumps(request).encode())
    with socket.socket(fileno=os.dup(server.fileno())) as connection:
        socket.send_fds(connection, [b"streams"], [0, 1, 2])
    fork = server.recv()
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(fork, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = server.recv()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
