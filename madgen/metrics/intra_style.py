"""Intra-Style loss: how different the textures of one picture's crops are (Gatys et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madgen.metrics.crops import Picture, mean_over_pairs, to_pixels

LABEL, HIGHER_IS_BETTER, SCALE = "I-StyleL", False, 1000
NETWORK, CROPS = "style", "all"
DEFINITION = (
    "mean squared difference of Gram matrices (over C x h x w) after the ReLU of conv1_1, conv2_1, conv3_1, conv4_1, "
    "conv5_1 of VGG19, sum over these; mean over all pairs of crops of a picture, then over pictures"
)
LAYERS = (1, 6, 11, 20, 29)
"""The ReLUs of torchvision's `vgg19().features`."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def score(pictures: Sequence[Picture], network: Any) -> list[float]:
    """One number a picture; NaN for a picture of one crop."""
    return [mean_over_pairs(losses(to_pixels(picture.tiles, network.device), network.net)) for picture in pictures]


@torch.no_grad()
def losses(pixels_N3hw: Tensor, net: Any) -> Tensor:
    """Style loss [N, N] of every crop with every other, pixels in 0..1."""
    found = [grams(pixels_3hw[None], net) for pixels_3hw in pixels_N3hw]
    total = torch.zeros(len(found), len(found), dtype=torch.float64)
    for first in range(len(found)):
        for second in range(first):
            pairs = zip(found[first], found[second], strict=True)
            total[first, second] = sum(float((a - b).square().mean(dtype=torch.float64)) for a, b in pairs)
    return total + total.T


def grams(pixels_13hw: Tensor, net: Any) -> list[Tensor]:
    """A Gram matrix [C, C] a layer."""
    mean, std = (torch.tensor(values, device=pixels_13hw.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    seen, found = (pixels_13hw - mean) / std, []
    for number, layer in enumerate(net[: LAYERS[-1] + 1]):
        seen = torch.relu(seen) if number in LAYERS else layer(seen)  # torchvision's ReLU writes over its input
        if number in LAYERS:
            flat = seen[0].flatten(1)
            found.append(flat @ flat.T / flat.numel())
    return found
