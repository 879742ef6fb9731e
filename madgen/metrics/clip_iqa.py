"""CLIP-IQA: CLIP's preference for "Good photo." over "Bad photo." on a random crop (Wang et al., AAAI 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from madgen.metrics.crops import CroppedImage

LABEL, HIGHER_IS_BETTER, SCALE = "CLIP-IQA", True, 1
NETWORK, CROPS = "clip", "random"
TEXTS = ("Good photo.", "Bad photo.")
DEFINITION = "softmax of 100 x cosines with 'Good photo.' and 'Bad photo.', share of the first; mean over pictures"


def score(images: Sequence[CroppedImage], network: Any) -> list[float]:
    """Return one value in 0..1 per image."""
    image_features = torch.nn.functional.normalize(network.net.features([image.crop for image in images]))
    text_features = torch.nn.functional.normalize(torch.cat([network.net.text_features(text) for text in TEXTS]))
    return (100 * image_features @ text_features.T).softmax(1)[:, 0].tolist()
