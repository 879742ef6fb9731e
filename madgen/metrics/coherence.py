"""Coherence: CLIP similarity between the crops of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from madgen.metrics.crops import CroppedImage, mean_over_pairs

LABEL, HIGHER_IS_BETTER, SCALE = "CLIP coherence", True, 1
NETWORK, CROPS = "clip", "all"
DEFINITION = "cosine of the embeddings of two crops; mean over all pairs of crops of a picture, then over pictures"


def score(images: Sequence[CroppedImage], network: Any) -> list[float]:
    """Return one value in -1..1 per image, NaN for an image with a single crop."""
    tiles = [tile for image in images for tile in image.tiles]
    features = torch.nn.functional.normalize(network.net.features(tiles)).double()
    return [mean_over_pairs(part @ part.T) for part in features.split([len(image.tiles) for image in images])]
