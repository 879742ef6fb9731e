"""Mean CLIP score: how well a random crop of each picture shows its prompt (Hessel et al., EMNLP 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from madgen.metrics.crops import Picture

LABEL, HIGHER_IS_BETTER, SCALE = "mCLIP", True, 1
NETWORK, CROPS = "clip", "random"
DEFINITION = "100 x cosine of text and crop, at least 0; mean over pictures"


def score(pictures: Sequence[Picture], network: Any) -> list[float]:
    """One number a picture, 0..100."""
    seen = network.image_features([picture.crop for picture in pictures])
    said = torch.cat([network.text_features(picture.prompt) for picture in pictures])
    return (100 * torch.nn.functional.cosine_similarity(seen, said)).clamp(min=0).tolist()
