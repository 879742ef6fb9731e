"""CLIP-IQA: how much rather "Good photo." than "Bad photo." CLIP says of a random crop (Wang et al., AAAI 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from madgen.metrics.crops import Picture

LABEL, HIGHER_IS_BETTER, SCALE = "CLIP-IQA", True, 1
NETWORK, CROPS = "clip", "random"
TEXTS = ("Good photo.", "Bad photo.")
DEFINITION = "softmax of 100 x cosines with 'Good photo.' and 'Bad photo.', share of the first; mean over pictures"


def score(pictures: Sequence[Picture], network: Any) -> list[float]:
    """One number a picture, 0..1."""
    seen = torch.nn.functional.normalize(network.image_features([picture.crop for picture in pictures]))
    said = torch.nn.functional.normalize(torch.cat([network.text_features(text) for text in TEXTS]))
    return (100 * seen @ said.T).softmax(1)[:, 0].tolist()
