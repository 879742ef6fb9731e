"""Describe what the last bits of a panorama depend on besides its job: device, threads, batch size and versions."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import torch

from madgen import __version__
from madgen.dataset.format import Environment
from madgen.utils.console import plural

LIBRARIES = ("diffusers", "transformers")


def environment(device: torch.device | str, batch_size: int) -> Environment:
    """Return the environment of this process."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Environment(name, device.type, torch.get_num_threads(), batch_size, _versions())


def describe(environment: Environment) -> str:
    """Format an environment: `2 threads on AMD EPYC, batches of 4, torch 2.15.0, ...`."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    threads = plural(environment.threads, "thread")
    return f"{threads} on {environment.device}, batches of {environment.batch_size}, {versions}"


@cache
def _versions() -> dict[str, str]:
    versions = {"madgen": __version__, "torch": torch.__version__}  # with the build, such as 2.15.0+cu132
    return {**versions, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
