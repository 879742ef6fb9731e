"""Adapted weights of a layer: LoRA, CP-decomposed convolutions, LoHa, LoKr, DoRA and full differences.

Names and formulas are those of LyCORIS, whose files PEFT's LoHa and LoKr share:

    LoRA   up @ down, with `mid` a Tucker decomposition of the kernel
    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b), elementwise
    LoKr   kron(w1, w2), each a matrix or a product of two
    DoRA   m * V / |V| with V = W + change, by rows (outputs) or columns (inputs)
    diff   the difference of weight and bias
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
LOKR = product(("lokr_w1", "lokr_w1_a lokr_w1_b"), ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2"))
FACTORS = {frozenset(names.split()) for names in ("down up", "down up mid", LOHA, f"{LOHA} hada_t1 hada_t2")} | {
    frozenset(" ".join(names).split()) for names in LOKR
}
COMPLETE = {
    *FACTORS,
    *(names | {"dora_scale"} for names in FACTORS),
    *(frozenset(names.split()) for names in ("diff", "diff diff_b", "w_norm", "w_norm b_norm")),
}
"""Sets of tensors that define the change of a layer."""
ROLES = frozenset[str]().union(*COMPLETE) - {"down", "up"}
"""Tensors of a layer that a LoRA does not have."""
RANKS = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Tensors whose first dimension is the rank, in this order."""
EPSILON = 2.0**-23  # of float32
"""Added to the norms of DoRA, as LyCORIS does."""


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank of a layer's factors; None if it has no low-rank factors, whose alpha does not count."""
    return next((tensors[name].shape[0] for name in RANKS if name in tensors), None)


def adapt_layer(module: Any, tensors: Mapping[str, Tensor], factor: float, scale: float) -> None:
    """Add `scale` times the change of a layer to its weights; `factor` (alpha / rank) multiplies the factors.

    Computed in float32. Raises UserError if the shapes do not fit.
    """
    base = module.weight.detach().float()
    change = _shaped(factor * change_of(tensors), base)
    if (magnitude := tensors.get("dora_scale")) is not None:
        change = _renormalized(base + change, magnitude.float()) - base
    module.weight.data.copy_(base + scale * change)
    bias = tensors.get("diff_b", tensors.get("b_norm"))
    if bias is not None:
        if module.bias is None:
            raise UserError("it changes a bias that this layer of the backbone does not have")
        base = module.bias.detach().float()
        module.bias.data.copy_(base + scale * _shaped(bias.float(), base))


def change_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the change of a weight in float32, before alpha / rank and DoRA; kernels may be flat."""
    values = {name: value.float() for name, value in tensors.items()}
    for name in ("diff", "w_norm"):
        if name in values:
            return values[name]
    if "down" in values:
        return _pair(values["up"], values["down"], values.get("mid"))
    if "hada_w1_a" in values:
        first, second = (
            _pair(values[f"hada_{name}_a"], values[f"hada_{name}_b"], values.get(f"hada_t{name[1]}"), transposed=True)
            for name in ("w1", "w2")
        )
        return first * second
    left = values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
    right = values.get("lokr_w2")
    if right is None:
        right = _pair(values["lokr_w2_a"], values["lokr_w2_b"], values.get("lokr_t2"), transposed=True)
    return torch.kron(left, right.flatten(1))


def _pair(up: Tensor, down: Tensor, core: Tensor | None, transposed: bool = False) -> Tensor:
    """Return up @ down, or their Tucker product with the core; `transposed`: the core's `up` is [rank, outputs]."""
    if core is None:
        return up.flatten(1) @ down.flatten(1)
    up = up if transposed else up.flatten(1).T
    return torch.einsum("rs...,ro,si->oi...", core, up, down.flatten(1))


def _shaped(change: Tensor, weight: Tensor) -> Tensor:
    """Reshape a change to its weight: files flatten kernels, and have 1x1 convolutions for linear layers."""
    if change.ndim == 0 or change.shape[0] != weight.shape[0] or change.numel() != weight.numel():
        raise UserError(f"its change has the shape {list(change.shape)}, the weight {list(weight.shape)}")
    return change.reshape(weight.shape)


def _renormalized(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Give the rows or columns of a weight, whichever the magnitudes are for, these norms."""
    outputs, inputs = weight.shape[:2]
    by_rows = magnitude.shape[:1] == (outputs,) and magnitude.numel() == outputs
    if not by_rows and (magnitude.shape[:2] != (1, inputs) or magnitude.numel() != inputs):
        raise UserError(
            f"its dora_scale has the shape {list(magnitude.shape)}, expected [{outputs}, 1] or [1, {inputs}]"
        )
    axis = 0 if by_rows else 1
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    shape = [-1 if dimension == axis else 1 for dimension in range(weight.ndim)]
    return weight * (magnitude.reshape(shape) / (torch.linalg.vector_norm(weight, dim=others, keepdim=True) + EPSILON))
