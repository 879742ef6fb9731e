"""VGG networks: perceptual distance between images (LPIPS) and style features, from torchmetrics and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from madgen.utils.errors import UserError

RANDOM_SEED = 2023


def lpips(network: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS (Zhang et al., CVPR 2018) over VGG16: two batches of pixels in 0..1 [B, 3, h, w] to distances [B].

    `vgg`: trained on ImageNet, from torchvision's download cache; UserError if the weights are not available. `random`:
    untrained with a fixed seed; it still compares colours and textures, and needs no download.
    """
    net = lpips_network(network == "vgg", "SyncDiffusion", "set method.sync.network=random").to(device)
    return lambda first_B3hw, second_B3hw: net(first_B3hw, second_B3hw, normalize=True).flatten()


@lru_cache(maxsize=2)
def lpips_network(trained: bool, user: str, alternative: str) -> Any:
    """Load LPIPS over VGG16 on the CPU. `user` needs it; `alternative` is what else can be done (for the UserError)."""
    from torchmetrics.functional.image.lpips import _LPIPS  # its public class cannot leave the network untrained

    return _loaded(lambda: _LPIPS(net="vgg", pnet_rand=not trained), "VGG16", user, alternative)


@lru_cache(maxsize=2)
def vgg19(trained: bool, user: str, alternative: str) -> Any:
    """Load the convolutions of torchvision's VGG19 on the CPU; arguments: see `lpips_network`."""
    from torchvision.models import VGG19_Weights
    from torchvision.models import vgg19 as build

    weights = VGG19_Weights.IMAGENET1K_V1 if trained else None
    return _loaded(lambda: build(weights=weights, progress=False).features, "VGG19", user, alternative)


def _loaded(build: Callable[[], Any], name: str, user: str, alternative: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        try:
            net = build()
        except (URLError, OSError) as error:
            raise UserError(
                f"{user} needs torchvision's {name} weights, which cannot be downloaded ({error}); "
                f"put them into {torch.hub.get_dir()}/checkpoints, or {alternative}"
            ) from error
    return net.eval().requires_grad_(False)
