"""Mean CLIP score: similarity of a random crop of each image to its prompt (Hessel et al., EMNLP 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from madgen.metrics.crops import CroppedImage

LABEL, HIGHER_IS_BETTER, SCALE = "mCLIP", True, 1
NETWORK, CROPS = "clip", "random"
DEFINITION = "100 x cosine of text and crop, at least 0; mean over pictures"


def score(images: Sequence[CroppedImage], network: Any) -> list[float]:
    """Return one value in 0..100 per image."""
    image_features = network.net.features([image.crop for image in images])
    text_features = torch.cat([network.net.text_features(image.prompt) for image in images])
    return (100 * torch.nn.functional.cosine_similarity(image_features, text_features)).clamp(min=0).tolist()
