"""Merge-Attend-Diffuse (MAD, Sec. 4) as an attention processor for each layer.

Averaging commutes with the linear projections, so the hidden states are merged before projecting: the canvas has fewer
tokens than its views together. Keys and values of the prompt depend on neither view nor step and are computed once.

Processors are installed once and hold no state; each pass of the network receives a `JointPass` as an argument. A
compiled network therefore needs one graph for each set of merged layers, and none for another step or prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from madgen.diffusion.kernels import onednn
from madgen.diffusion.merge import Grid, merge_cells, split_cells, with_kernels
from madgen.diffusion.views import Views

if TYPE_CHECKING:
    from torch import Tensor

KeysValues: TypeAlias = "tuple[Tensor, Tensor]"
"""Keys and values of the prompts, by head: [N, heads, T, D / heads]."""
Grids = Mapping[int, Grid]
"""The views at each layer's resolution, by the number of tokens of a view."""


@dataclass(frozen=True)
class Merging:
    """Which attention layers merge, and in which steps; see `method.mad` of the job."""

    steps: int
    """Layers merge in the first `steps` denoising steps."""
    blocks: tuple[str, ...]
    """`all`, names of groups of layers such as `down` or `early`, or patterns of layer names."""
    cross_attention: str
    """`scheduled`: like self-attention; `always`: merged in every step."""
    positions: str = "canvas"
    """Positions of image tokens in merged layers of transformers: `canvas`, `fit` or `local`."""

    @property
    def end(self) -> int:
        """First step from which on no layer merges."""
        return sys.maxsize if self.cross_attention == "always" else self.steps

    def applies(self, step: int, crosses: bool) -> bool:
        """Return whether a selected layer merges at `step`; `crosses`: it attends to the prompt."""
        return step < self.steps or (crosses and self.cross_attention == "always")


@dataclass(frozen=True)
class JointStep:
    """Views of one canvas that are denoised together, in one denoising step."""

    views: Views
    step: int
    merging: Merging
    first: int = 0
    """Index of the first view that is denoised; more than 0 in chunks of views."""


class AttentionLayer(Protocol):
    """The part of diffusers' `Attention` used here."""

    processor: Any
    heads: int
    scale: float
    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any


@dataclass(frozen=True)
class JointPass:
    """One pass of the network over views of several paths, as its attention layers see it.

    All tensors that the layers read are fields, so that a pass can be compiled or captured as a CUDA graph.
    """

    paths: int
    """Number of prompts and negative prompts; each sees V views."""
    prompt: Mapping[str, KeysValues]
    """Keys and values of the prompts for each cross-attention layer, shared by the views of a path; a layer that is
    missing projects them itself."""
    merged: frozenset[str] = frozenset()
    """Names of the layers that attend on the canvas; in the others each view attends separately."""
    grids: Grids = field(default_factory=dict)
    """The views on the canvas. Needed where layers merge; otherwise V may be any part of the canvas's views."""
    halved: str | None = None
    """Name of a layer whose input is the same in both halves of the paths, and which attends to one of them."""
    style: Mapping[str, KeysValues] = field(default_factory=dict)
    """Keys and values of the style pictures of the paths for each cross-attention layer (IP-Adapter)."""
    style_scale: float = 1.0
    """Weight of what is attended in the style pictures."""
    onednn: bool = False
    """Use `madgen.diffusion.kernels.onednn` where it is faster."""


@dataclass(frozen=True)
class JointAttention:
    """Attention processor of one layer: joint attention over the views of a `JointPass`.

    Hidden states are [N * V, L, D], views innermost. Without a pass the layer's `original` processor runs.
    """

    name: str
    original: Any = None

    def __call__(
        self,
        attn: AttentionLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        joint: JointPass | None = None,
    ) -> Tensor:
        if joint is None:
            output: Tensor = self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
            return output
        if attention_mask is not None:
            raise ValueError(f"{self.name}: joint attention takes no attention mask")
        if joint.halved == self.name:
            half = self._attend_views(attn, hidden_states[: len(hidden_states) // 2], joint, joint.paths // 2, None)
            return torch.cat([half, half])
        return self._attend_views(attn, hidden_states, joint, joint.paths, encoder_hidden_states)

    def _attend_views(
        self, attn: AttentionLayer, hidden_MLD: Tensor, joint: JointPass, paths: int, prompt_NTD: Tensor | None
    ) -> Tensor:
        """Attend on the canvas or in each view, M = paths * V."""
        batch, tokens, width = hidden_MLD.shape
        if self.name in joint.merged:
            grid = joint.grids[tokens]
            canvas = merge_cells(hidden_MLD.reshape(paths, -1, grid.rows.size, grid.columns.size, width), grid)
            output = self._attend(attn, canvas.flatten(1, 2), joint, prompt_NTD)
            output = split_cells(output.reshape(*canvas.shape[:3], -1), grid)
        elif prompt_NTD is not None:  # tokens query the prompt independently, so the views of a path form one sequence
            output = self._attend(attn, hidden_MLD.reshape(paths, -1, width), joint, prompt_NTD)
        else:
            output = self._attend(attn, hidden_MLD, joint, None)
        return output.reshape(batch, tokens, -1)

    def _attend(self, attn: AttentionLayer, hidden_NLD: Tensor, joint: JointPass, prompt_NTD: Tensor | None) -> Tensor:
        query = by_head(attn, attn.to_q(hidden_NLD))
        if prompt_NTD is not None:
            projected = joint.prompt.get(self.name)
            key, value = keys_values(attn, prompt_NTD) if projected is None else projected
        else:
            key, value = by_head(attn, attn.to_k(hidden_NLD)), by_head(attn, attn.to_v(hidden_NLD))
        if joint.onednn and onednn.attends(query, key, value):
            output = onednn.attention(query, key, value, attn.scale)
        else:
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        if prompt_NTD is not None and self.name in joint.style:
            styled = torch.nn.functional.scaled_dot_product_attention(query, *joint.style[self.name], scale=attn.scale)
            output = output + joint.style_scale * styled
        output = attn.to_out[0](output.transpose(1, 2).flatten(2))
        return attn.to_out[1](output)


def by_head(attn: AttentionLayer, projected_NLD: Tensor) -> Tensor:
    """Split the width into heads: [N, heads, L, D / heads]."""
    return projected_NLD.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def keys_values(attn: AttentionLayer, prompt_NTD: Tensor) -> KeysValues:
    """Project the prompts to keys and values, for all views and steps."""
    return by_head(attn, attn.to_k(prompt_NTD)), by_head(attn, attn.to_v(prompt_NTD))


@lru_cache(maxsize=256)
def grids_of(views: Views, device: torch.device) -> Grids:
    """Return the grids of `views` at every resolution at which they fall on whole cells."""
    finest, factors = views.rows.size * views.columns.size, []
    factor = 1
    while views.divisible(factor):
        factors.append(factor)
        factor *= 2
    return {finest // factor**2: with_kernels(views.scaled(factor), device) for factor in factors}
