"""Identify machines, so that a process id is unambiguous."""

from __future__ import annotations

import os
from pathlib import Path


def boot_id() -> str:
    """Return an id of the boot and PID namespace within which a PID is unambiguous; '' if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
