"""The paper's scores and later ones. The file name is the registry key: `metrics/fid.py` is the metric `fid`.

A metric module has `LABEL`, `HIGHER_IS_BETTER`, `SCALE` (the table's factor), `NETWORK` (the role of the network that
it looks through, see `extractors`), `DEFINITION` (what it computes, in words: part of its protocol), and one of

- `CROPS` (`random` or `all`) and `score(pictures, network) -> list[float]`: a number for each picture, NaN where it can
  have none;
- `distance(features_ND, reference_MD) -> float`: a number for a prompt, from the features of one random crop a picture,
  against those of the reference.

The other modules, `runner`, `report` and so on, are what they share.
"""

from __future__ import annotations

import importlib
from typing import Any

from madgen.utils.errors import UserError

PAPER = ("clip_score", "intra_lpips", "intra_style", "fid", "kid", "giqa")
"""The columns of the paper's tables, in order."""
METRICS = (*PAPER, "fd_dinov2", "coherence", "clip_iqa")


def metric(name: str) -> Any:
    """The module of a metric; UserError lists the known ones."""
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
    return importlib.import_module(f"{__name__}.{name}")


def against_reference(name: str) -> bool:
    """Whether a metric compares with a reference."""
    return hasattr(metric(name), "distance")
