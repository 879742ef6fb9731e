"""FID: Fréchet distance between Gaussians fitted to crops' and reference features (Heusel et al., NeurIPS 2017)."""

from __future__ import annotations

import numpy as np

LABEL, HIGHER_IS_BETTER, SCALE = "FID", False, 1
NETWORK = "features"
DEFINITION = "squared Frechet distance of Gaussians with the features' means and covariances (n - 1)"
ROWS = 4096
"""Rows converted to float64 at once."""


def distance(features_ND: np.ndarray, reference_MD: np.ndarray) -> float:
    """Return `|m - m'|² + Tr(S + S' - 2 (S S')^½)`, computed in float64; needs at least two rows each.

    With `S = A'A` and `S' = B'B`, the trace of the root is the sum of the singular values of `A B'`. Unlike a matrix
    root this stays exact with fewer images than features, as in the paper, where S is singular.
    """
    mean, root = _gaussian(features_ND)
    reference_mean, reference_root = _gaussian(reference_MD)
    overlap = np.linalg.svd(root @ reference_root.T, compute_uv=False).sum()
    spread = np.square(root).sum() + np.square(reference_root).sum()
    return float(np.square(mean - reference_mean).sum() + spread - 2 * overlap)


def _gaussian(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and a root of the covariance, with min(N, D) rows."""
    count, width = features_ND.shape
    mean = np.zeros(width)
    for start in range(0, count, ROWS):
        mean += features_ND[start : start + ROWS].sum(axis=0, dtype=np.float64) / count
    if count <= width:
        return mean, (features_ND.astype(np.float64) - mean) / np.sqrt(count - 1)
    covariance = np.zeros((width, width))
    for start in range(0, count, ROWS):
        part = features_ND[start : start + ROWS].astype(np.float64) - mean
        covariance += part.T @ part / (count - 1)
    values, vectors = np.linalg.eigh(covariance)
    return mean, np.sqrt(values.clip(min=0))[:, None] * vectors.T
