"""Folders of the repository that an installed package contains as well: presets, jobs and batch scripts."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """Return the folder `name` (`configs`, `jobs` or `slurm`), of the installed package or else of the checkout."""
    packaged = PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name
