"""Merge-Attend-Diffuse (MAD, Sec. 4) as an attention processor, one a layer.

Averaging commutes with the linear projections, so the hidden states are merged first: the canvas has fewer tokens
than its views together. Keys and values of the prompt do not depend on view or step: each layer computes them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from madgen.joint.merge import merge_cells, split_cells
from madgen.joint.views import Views


class KeyValueCache:
    """Keys and values of the prompts: a layer projects them once for all paths, or once for each that comes alone."""

    def __init__(self) -> None:
        self._projected: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self._path: int | None = None

    @contextmanager
    def alone(self, path: int) -> Iterator[None]:
        """Within it layers are given the prompt of this path alone."""
        self._path = path
        try:
            yield
        finally:
            self._path = None

    def get(self, layer: str, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values [N, T, D] of the paths at hand."""
        key = layer, self._path
        if key not in self._projected:
            self._projected[key] = project()
        return self._projected[key]


class AttentionHost(Protocol):
    """A network whose attention layers take processors (diffusers' UNets)."""

    @property
    def attn_processors(self) -> Mapping[str, Any]: ...

    def set_attn_processor(self, processor: Any) -> None: ...


class JointAttention:
    """Attention of one layer over the views of one canvas.

    `merged`: attend on the canvas and split the result; otherwise each view attends by itself. Hidden states are
    [N * V, L, D], views innermost; those of the prompt are [N, T, D], shared by the views of a path. Where nothing
    merges, V may be any part of the canvas's views.
    """

    def __init__(self, name: str, views: Views, merged: bool, cache: KeyValueCache):
        self.name, self.views, self.merged, self.cache = name, views, merged, cache

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError(f"{self.name}: joint attention takes no attention mask")
        batch, tokens, width = hidden_states.shape
        grid = self._grid(tokens)
        if self.merged:
            paths = batch // grid.count
            size = (grid.rows.size, grid.columns.size)
            canvas = merge_cells(hidden_states.reshape(paths, grid.count, *size, width), grid)
            hidden_states = canvas.reshape(paths, -1, width)
        elif encoder_hidden_states is not None:  # each token asks the prompt by itself: views need not be told apart
            hidden_states = hidden_states.reshape(len(encoder_hidden_states), -1, width)
        output = self._attend(attn, hidden_states, encoder_hidden_states)
        if self.merged:
            output = split_cells(output.reshape(paths, grid.rows.extent, grid.columns.extent, -1), grid)
        return output.reshape(batch, tokens, -1)

    def _grid(self, tokens: int) -> Views:
        """The views at this layer's resolution, told from the number of tokens of a view."""
        cells = self.views.rows.size * self.views.columns.size
        return self.views.scaled(math.isqrt(cells // tokens)) if self.merged else self.views

    def _attend(self, attn: Any, hidden_NLD: Tensor, prompt_NTD: Tensor | None) -> Tensor:
        query = attn.to_q(hidden_NLD)
        if prompt_NTD is None:
            key, value = attn.to_k(hidden_NLD), attn.to_v(hidden_NLD)
        else:
            key, value = self.cache.get(self.name, lambda: (attn.to_k(prompt_NTD), attn.to_v(prompt_NTD)))

        def heads(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        output = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), scale=attn.scale)
        output = attn.to_out[0](output.transpose(1, 2).flatten(2))
        return attn.to_out[1](output)


@contextmanager
def joint_attention(host: AttentionHost, processors: Mapping[str, JointAttention]) -> Iterator[None]:
    """Runs with `processors` installed and always restores the ones that were there."""
    original = dict(host.attn_processors)
    host.set_attn_processor(dict(processors))  # diffusers empties the dict it is given
    try:
        yield
    finally:
        host.set_attn_processor(original)
