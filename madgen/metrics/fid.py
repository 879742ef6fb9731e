"""FID: how far the crops' features lie from the reference's, both taken as Gaussians (Heusel et al., NeurIPS 2017)."""

from __future__ import annotations

import numpy as np

LABEL, HIGHER_IS_BETTER, SCALE = "FID", False, 1
NETWORK = "features"
DEFINITION = "squared Frechet distance of Gaussians with the features' means and covariances (n - 1)"
ROWS = 4096


def distance(features_ND: np.ndarray, reference_MD: np.ndarray) -> float:
    """`|m - m'|² + Tr(S + S' - 2 (S S')^½)`, in float64; at least two rows each.

    With `S = A'A` and `S' = B'B`, the trace of the root is the sum of the singular values of `A B'`: exact also where
    there are fewer pictures than features, as in the paper, and S has no inverse, and then cheaper than eigenvalues.
    """
    mean, root = _gaussian(features_ND)
    reference_mean, reference_root = _gaussian(reference_MD)
    overlap = np.linalg.svd(root @ reference_root.T, compute_uv=False).sum()
    spread = np.square(root).sum() + np.square(reference_root).sum()
    return float(np.square(mean - reference_mean).sum() + spread - 2 * overlap)


def _gaussian(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and a root of the covariance of as few rows as there can be."""
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
