"""Classifier-free guidance and guidance embeddings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def classifier_free(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Combine noise predictions of one shape by classifier-free guidance."""
    return unconditional + guidance_scale * (conditional - unconditional)


def norm_rescaled(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Combine tokens [..., D] by classifier-free guidance, with the norms of the conditional ones (Lin et al. 2023)."""
    guided = classifier_free(unconditional, conditional, guidance_scale)
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def guidance_embedding(weights_B: Tensor, dim: int) -> Tensor:
    """Return sinusoids [B, dim] of the guidance weight times 1000 (Latent Consistency Models, Sec. 4.3)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = weights_B[:, None].float() * 1000 * frequencies[None]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
