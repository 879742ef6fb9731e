"""Intra-LPIPS: how different the crops of one picture look (Zhang et al., CVPR 2018; pairs as in SyncDiffusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madgen.metrics.crops import Picture, mean_over_pairs, to_pixels

LABEL, HIGHER_IS_BETTER, SCALE = "I-LPIPS", False, 1
NETWORK, CROPS = "lpips", "all"
DEFINITION = "LPIPS of two crops; mean over all pairs of crops of a picture, then over pictures"


def score(pictures: Sequence[Picture], network: Any) -> list[float]:
    """One number a picture; NaN for a picture of one crop."""
    return [mean_over_pairs(distances(to_pixels(picture.tiles, network.device), network.net)) for picture in pictures]


@torch.no_grad()
def distances(pixels_N3hw: Tensor, net: Any) -> Tensor:
    """LPIPS [N, N] of every crop with every other, pixels in 0..1: each crop goes through VGG once, not once a pair."""
    from torchmetrics.functional.image.lpips import _normalize_tensor

    layers = [[] for _ in range(net.L)]  # type: list[list[Tensor]]
    for pixels_3hw in pixels_N3hw:
        for layer, seen in zip(layers, net.net(net.scaling_layer(2 * pixels_3hw[None] - 1)), strict=True):
            layer.append(_normalize_tensor(seen))
    total = torch.zeros(len(pixels_N3hw), len(pixels_N3hw), dtype=torch.float64)
    for layer, linear in zip(layers, net.lins, strict=True):
        for first in range(len(layer)):
            for second in range(first):
                apart = linear((layer[first] - layer[second]) ** 2).mean().double()
                total[first, second] += apart.cpu()
    return total + total.T
