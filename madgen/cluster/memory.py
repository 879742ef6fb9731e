"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> int:
    """Return the peak in bytes: of GPU memory if a GPU is in use, else of resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
