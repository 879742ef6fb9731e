"""Intra-Style loss: difference in texture between the crops of one image (Gatys et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madgen.metrics.crops import CroppedImage, compare_pairs, mean_over_pairs, to_pixels

LABEL, HIGHER_IS_BETTER, SCALE = "I-StyleL", False, 1000
NETWORK, CROPS = "style", "all"
DEFINITION = (
    "mean squared difference of Gram matrices (over C x h x w) after the ReLU of conv1_1, conv2_1, conv3_1, conv4_1, "
    "conv5_1 of VGG19, sum over these; mean over all pairs of crops of a picture, then over pictures"
)
LAYERS = (1, 6, 11, 20, 29)
"""The ReLUs of torchvision's `vgg19().features`."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


@torch.no_grad()
def score(images: Sequence[CroppedImage], network: Any) -> list[float]:
    """Return one value per image, NaN for an image with a single crop."""
    tiles = (to_pixels(image.tiles, network.device) for image in images)
    matrices = ([grams(tile[None], network.net) for tile in part] for part in tiles)
    return [mean_over_pairs(compare_pairs(part, loss)) for part in matrices]


def loss(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the style loss of two crops, given their Gram matrices."""
    return sum(float((a - b).square().mean(dtype=torch.float64)) for a, b in zip(first, second, strict=True))


def grams(pixels_13hw: Tensor, net: Any) -> list[Tensor]:
    """Return one Gram matrix [C, C] per layer."""
    mean, std = (torch.tensor(values, device=pixels_13hw.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    features, matrices = (pixels_13hw - mean) / std, []
    for number, layer in enumerate(net[: LAYERS[-1] + 1]):
        # torchvision's ReLU works in place
        features = torch.relu(features) if number in LAYERS else layer(features)
        if number in LAYERS:
            flat = features[0].flatten(1)
            matrices.append(flat @ flat.T / flat.numel())
    return matrices
