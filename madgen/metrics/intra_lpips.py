"""Intra-LPIPS: perceptual difference between an image's crops (Zhang et al., CVPR 2018; pairs as in SyncDiffusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madgen.metrics.crops import CroppedImage, mean_over_pairs, to_pixels

LABEL, HIGHER_IS_BETTER, SCALE = "I-LPIPS", False, 1
NETWORK, CROPS = "lpips", "all"
DEFINITION = "LPIPS of two crops; mean over all pairs of crops of a picture, then over pictures"


def score(images: Sequence[CroppedImage], network: Any) -> list[float]:
    """Return one value per image, NaN for an image with a single crop."""
    return [mean_over_pairs(distances(to_pixels(image.tiles, network.device), network.net)) for image in images]


@torch.no_grad()
def distances(pixels_N3hw: Tensor, net: Any) -> Tensor:
    """Return the LPIPS [N, N] of all pairs of crops, pixels in 0..1; each crop passes through VGG only once."""
    from torchmetrics.functional.image.lpips import _normalize_tensor

    features = [
        [_normalize_tensor(layer) for layer in net.net(net.scaling_layer(2 * pixels_3hw[None] - 1))]
        for pixels_3hw in pixels_N3hw
    ]
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for first in range(len(features)):
        for second in range(first):
            for one, other, linear in zip(features[first], features[second], net.lins, strict=True):
                total[first, second] += linear((one - other) ** 2).mean().double().cpu()
    return total + total.T
