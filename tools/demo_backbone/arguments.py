"""Command line arguments that the trainers share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the folder, the device, the seed and the number of scenes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=32_768)
    return parser
