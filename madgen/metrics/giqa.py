"""Mean KNN-GIQA: closeness of each crop to its nearest reference images (Gu et al., ECCV 2020)."""

from __future__ import annotations

import numpy as np
import torch

LABEL, HIGHER_IS_BETTER, SCALE = "mGIQA", True, 1000
NETWORK = "features"
NEIGHBOURS = 8
DEFINITION = (
    "sum over the 8 nearest pictures of the reference of 1 / L1 distance (the released code); mean over pictures"
)
MIN_DIFFERENCE = 1e-6
"""Lower bound of the mean difference per feature, as in the released code: a reference image scores finitely."""
ROWS = 256


def distance(features_ND: np.ndarray, reference_MD: np.ndarray) -> float:
    """Return the mean over images, computed in float64; needs at least one row, and 8 in the reference.

    The paper's text divides by K; its numbers, and the released code, are sums over distances that are not squared.
    """
    reference, total = torch.from_numpy(np.ascontiguousarray(reference_MD, dtype=np.float64)), 0.0
    for start in range(0, len(features_ND), ROWS):
        part = torch.from_numpy(np.ascontiguousarray(features_ND[start : start + ROWS], dtype=np.float64))
        nearest = torch.cdist(part, reference, p=1).topk(NEIGHBOURS, largest=False).values
        total += float((1 / nearest.clamp(min=MIN_DIFFERENCE * reference.shape[1])).sum())
    return total / len(features_ND)
