"""KID: squared maximum mean discrepancy of crops' and reference features (Bińkowski et al., ICLR 2018)."""

from __future__ import annotations

import numpy as np

LABEL, HIGHER_IS_BETTER, SCALE = "KID", False, 1000
NETWORK = "features"
DEFINITION = "unbiased estimate over all pictures (no subsets), kernel (x'y / D + 1)^3"
ROWS = 1024


def distance(features_ND: np.ndarray, reference_MD: np.ndarray) -> float:
    """Return the unbiased estimate, computed in float64; needs at least two rows each.

    It is about 0, and may be negative, where both sets come from one distribution.
    """
    n, m = len(features_ND), len(reference_MD)
    within = _kernel_sum(features_ND, features_ND, diagonal=False) / (n * (n - 1))
    within_reference = _kernel_sum(reference_MD, reference_MD, diagonal=False) / (m * (m - 1))
    return within + within_reference - 2 * _kernel_sum(features_ND, reference_MD) / (n * m)


def _kernel_sum(first_ND: np.ndarray, second_MD: np.ndarray, diagonal: bool = True) -> float:
    width, total = first_ND.shape[1], 0.0
    for start in range(0, len(first_ND), ROWS):
        part = first_ND[start : start + ROWS].astype(np.float64)
        for other in range(0, len(second_MD), ROWS):
            total += float(((part @ second_MD[other : other + ROWS].astype(np.float64).T / width + 1) ** 3).sum())
        if not diagonal:
            total -= float((((part**2).sum(axis=1) / width + 1) ** 3).sum())
    return total
