"""Randomness is a function of identity, never of rank, order or time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 48


def sample_seed(job_seed: int, prompt_id: str, sample_index: int) -> int:
    """The torch seed of one sample: 48 bits of blake2b over `job_seed/prompt_id/sample_index`."""
    identity = f"{job_seed}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=SEED_BITS // 8).digest(), "big")


def derived_seed(seed: int, purpose: str) -> int:
    """The seed of a sample's other random numbers, such as the colours behind its regions."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=SEED_BITS // 8).digest(), "big")


def generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator a prompt: the same numbers on every device."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(generators: list[torch.Generator], channels: int, height: int, width: int) -> torch.Tensor:
    """float32 [B, C, height, width] (latent cells): the first numbers that each generator gives."""
    import torch

    shape = (1, channels, height, width)
    return torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])
