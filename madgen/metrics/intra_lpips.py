"""Intra-LPIPS: perceptual difference between an image's crops (Zhang et al., CVPR 2018; pairs as in SyncDiffusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madgen.metrics.crops import CroppedImage, compare_pairs, mean_over_pairs, to_pixels

LABEL, HIGHER_IS_BETTER, SCALE = "I-LPIPS", False, 1
NETWORK, CROPS = "lpips", "all"
DEFINITION = "LPIPS of two crops; mean over all pairs of crops of a picture, then over pictures"


@torch.no_grad()
def score(images: Sequence[CroppedImage], network: Any) -> list[float]:
    """Return one value per image, NaN for an image with a single crop."""
    from torchmetrics.functional.image.lpips import _normalize_tensor

    net = network.net

    def features(pixels_3hw: Tensor) -> list[Tensor]:
        return [_normalize_tensor(layer) for layer in net.net(net.scaling_layer(2 * pixels_3hw[None] - 1))]

    def distance(first: list[Tensor], second: list[Tensor]) -> float:
        layers = zip(first, second, net.lins, strict=True)
        return sum(float(linear((one - other) ** 2).mean()) for one, other, linear in layers)

    tiles = (to_pixels(image.tiles, network.device) for image in images)
    return [mean_over_pairs(compare_pairs(list(map(features, tiles_N3hw)), distance)) for tiles_N3hw in tiles]
