"""Perceptual distance between pictures. The only home of torchmetrics' networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from urllib.error import URLError

import torch
from torch import Tensor

from madgen.errors import UserError

NETWORKS = ("vgg", "random")
RANDOM_SEED = 2023


@lru_cache(maxsize=2)
def lpips(network: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (Zhang et al., CVPR 2018) over VGG16: two batches of pixels in 0..1 [B, 3, h, w] to distances [B].

    `vgg`: trained on ImageNet, from torchvision's download cache; UserError if the weights cannot be had. `random`:
    untrained, always the same; it still compares colours and textures, and needs no download.
    """
    if network not in NETWORKS:
        raise UserError(f"sync network must be one of {', '.join(NETWORKS)}, got {network!r}")
    from torchmetrics.functional.image.lpips import _LPIPS  # its public class cannot leave the network untrained

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        try:
            net = _LPIPS(net="vgg", pnet_rand=network == "random")
        except (URLError, OSError) as error:
            raise UserError(
                f"SyncDiffusion needs torchvision's VGG16 weights, and they cannot be downloaded from here ({error}); "
                f"put them into {torch.hub.get_dir()}/checkpoints, or set method.sync.network=random"
            ) from error
    net = net.to(device).eval().requires_grad_(False)

    def distance(first_B3hw: Tensor, second_B3hw: Tensor) -> Tensor:
        return net(first_B3hw, second_B3hw, normalize=True).flatten()

    return distance
