"""Merge-Attend-Diffuse (MAD, Sec. 4) as an attention processor, one a layer.

Averaging commutes with the linear projections, so the hidden states are merged first: the canvas has fewer tokens
than its views together. Keys and values of the prompt do not depend on view or step: each layer computes them once.

The processors stay the same objects from step to step, and what they do is told by flags and tensors: a compiled
network has one graph for each set of layers that merge, and needs none for another step or prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from madgen.diffusion.kernels import onednn
from madgen.diffusion.merge import Grid, merge_cells, split_cells, with_kernels
from madgen.diffusion.views import Views

KeysValues = tuple[Tensor, Tensor]
"""Of the prompts, by head: [N, heads, T, D / heads]."""
Grids = Mapping[int, Grid]
"""By the number of tokens of a view: the views at a layer's resolution."""


class AttentionLayer(Protocol):
    """diffusers' `Attention`, of which this is used."""

    processor: Any
    heads: int
    scale: float
    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any


class JointAttention:
    """Attention of one layer over the views of one canvas.

    `grids` given: attend on the canvas and split the result; None: each view attends by itself. Hidden states are
    [N * V, L, D], views innermost; the prompts' keys and values, of cross-attention, are shared by the views of a path.
    Where nothing merges, V may be any part of the canvas's views.

    `twice`: the second half of the paths is the first again, and is not attended to by itself. `by_onednn`: by
    `madgen.diffusion.kernels.onednn` where that can be.
    """

    def __init__(self, name: str, paths: int = 1, grids: Grids | None = None, prompt: KeysValues | None = None):
        self.name, self.paths, self.grids, self.prompt = name, paths, grids, prompt
        self.twice = self.by_onednn = False

    @property
    def merged(self) -> bool:
        """Whether views meet here."""
        return self.grids is not None

    def __call__(
        self,
        attn: AttentionLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError(f"{self.name}: joint attention takes no attention mask")
        if self.twice:
            once = self._of_views(attn, hidden_states[: len(hidden_states) // 2], self.paths // 2, False)
            return torch.cat([once, once])
        return self._of_views(attn, hidden_states, self.paths, encoder_hidden_states is not None)

    def _of_views(self, attn: AttentionLayer, hidden_MLD: Tensor, paths: int, crosses: bool) -> Tensor:
        """M = paths * V."""
        batch, tokens, width = hidden_MLD.shape
        if self.grids is not None:
            grid = self.grids[tokens]
            canvas = merge_cells(hidden_MLD.reshape(paths, -1, grid.rows.size, grid.columns.size, width), grid)
            output = self._attend(attn, canvas.flatten(1, 2), crosses)
            output = split_cells(output.reshape(*canvas.shape[:3], -1), grid)
        elif crosses:  # each token asks the prompt by itself: views need not be told apart
            output = self._attend(attn, hidden_MLD.reshape(paths, -1, width), True)
        else:
            output = self._attend(attn, hidden_MLD, False)
        return output.reshape(batch, tokens, -1)

    def _attend(self, attn: AttentionLayer, hidden_NLD: Tensor, crosses: bool) -> Tensor:
        query = by_head(attn, attn.to_q(hidden_NLD))
        if crosses:
            assert self.prompt is not None, f"{self.name} was not told the prompts' keys and values"
            key, value = self.prompt
        else:
            key, value = by_head(attn, attn.to_k(hidden_NLD)), by_head(attn, attn.to_v(hidden_NLD))
        if self.by_onednn and onednn.attends(query, key, value):
            output = onednn.attention(query, key, value, attn.scale)
        else:
            output = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        output = attn.to_out[0](output.transpose(1, 2).flatten(2))
        return attn.to_out[1](output)


def by_head(attn: AttentionLayer, projected_NLD: Tensor) -> Tensor:
    """[N, heads, L, D / heads]."""
    return projected_NLD.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def keys_values(attn: AttentionLayer, prompt_NTD: Tensor) -> KeysValues:
    """What every view and step asks the prompts."""
    return by_head(attn, attn.to_k(prompt_NTD)), by_head(attn, attn.to_v(prompt_NTD))


@lru_cache(maxsize=256)
def grids_of(views: Views, device: torch.device) -> Grids:
    """`views` at every resolution at which they fall on whole cells."""
    finest, factors = views.rows.size * views.columns.size, []
    factor = 1
    while views.divisible(factor):
        factors.append(factor)
        factor *= 2
    return {finest // factor**2: with_kernels(views.scaled(factor), device) for factor in factors}


@contextmanager
def joint_attention(layers: Mapping[str, AttentionLayer], processors: Mapping[str, JointAttention]) -> Iterator[None]:
    """Runs with the layers' `processors` installed and always restores the ones that were there."""
    original = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.processor = processors[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.processor = original[name]
