"""Coherence: how alike the crops of one picture are to CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from madgen.metrics.crops import Picture, mean_over_pairs

LABEL, HIGHER_IS_BETTER, SCALE = "CLIP coherence", True, 1
NETWORK, CROPS = "clip", "all"
DEFINITION = "cosine of the embeddings of two crops; mean over all pairs of crops of a picture, then over pictures"


def score(pictures: Sequence[Picture], network: Any) -> list[float]:
    """One number a picture, -1..1; NaN for a picture of one crop."""
    seen = torch.nn.functional.normalize(
        network.image_features([tile for picture in pictures for tile in picture.tiles])
    )
    parts = seen.double().split([len(picture.tiles) for picture in pictures])
    return [mean_over_pairs(part @ part.T) for part in parts]
