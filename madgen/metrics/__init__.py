"""Metrics of the paper and later ones. The file name is the registry key: `metrics/fid.py` is the metric `fid`.

A metric module defines `LABEL`, `HIGHER_IS_BETTER`, `SCALE` (factor in tables), `NETWORK` (role of the feature
extractor, see `extractors`), `DEFINITION` (the formula in words, part of the protocol that reports record), and one of

- `CROPS` (`random` or `all`) and `score(images, network) -> list[float]`: one value per image, NaN where undefined;
- `distance(features_ND, reference_MD) -> float`: one value per prompt, from the features of one random crop per image
  and those of the reference images.

`crops` and `extractors` are shared by all metrics.
"""

from __future__ import annotations

import importlib
from typing import Any

from madgen.utils.errors import UserError

PAPER = ("clip_score", "intra_lpips", "intra_style", "fid", "kid", "giqa")
"""The columns of the paper's tables, in order."""
METRICS = (*PAPER, "fd_dinov2", "coherence", "clip_iqa")


def metric(name: str) -> Any:
    """Import the module of a metric; raise UserError listing the known metrics."""
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
    return importlib.import_module(f"{__name__}.{name}")


def needs_reference(name: str) -> bool:
    """Return True for metrics that compare with reference images."""
    return hasattr(metric(name), "distance")
