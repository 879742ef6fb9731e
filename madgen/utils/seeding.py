"""Seeds and noise as functions of a sample's identity, never of rank, order or time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 48


def sample_seed(job_seed: int, prompt_id: str, sample_index: int) -> int:
    """Return the torch seed of a sample: 48 bits of blake2b over `job_seed/prompt_id/sample_index`."""
    return derived_seed(job_seed, f"{prompt_id}/{sample_index}")


def derived_seed(seed: int, purpose: str) -> int:
    """Return the seed of other random numbers of a sample, such as the background colours of its regions."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=SEED_BITS // 8).digest(), "big")


def generators(seeds: list[int]) -> list[torch.Generator]:
    """Return one CPU generator per prompt, which gives the same numbers on every device."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(generators: list[torch.Generator], channels: int, height: int, width: int) -> torch.Tensor:
    """Return float32 noise [B, C, height, width] in latent cells, the first numbers of each generator."""
    import torch

    shape = (1, channels, height, width)
    return torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])
