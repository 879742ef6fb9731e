"""Merge-Attend-Diffuse in transformers: any attention layer, run on the canvas.

The hidden states of the image are averaged over the views that cover a token, those of the prompt over all views. The
layer then runs on the canvas as it is, with its projections, query and key norms, rotations and output, and each view
continues with its part. Projecting first would differ: query and key norms do not commute with averaging.

Letters: P paths (prompts and negative prompts), V views, T tokens of the prompt, L tokens of a view, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from madgen.diffusion.merge import Grid, merge_cells, split_cells

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenPass:
    """One pass of a transformer over all views of one canvas, as its attention layers see it."""

    paths: int
    """P: number of prompts and negative prompts; each sees V views."""
    merged: frozenset[str]
    """Names of the layers that attend on the canvas; in the others each view attends separately."""
    grid: Grid
    """The views on the canvas, in tokens."""
    rotary: Any = None
    """Rotary embedding of the canvas in merged layers, in the form that the layers take; None: they take none."""
    embedding: Tensor | None = None
    """Positions added to the tokens of the views at the input, [P * V, L, D]; None: those of each view."""

    @property
    def views(self) -> int:
        """V: number of views."""
        return self.grid.rows.count * self.grid.columns.count

    @property
    def view_tokens(self) -> int:
        """L: number of image tokens of a view."""
        return self.grid.rows.size * self.grid.columns.size

    @property
    def canvas_tokens(self) -> int:
        """Number of image tokens of the canvas."""
        return self.grid.rows.extent * self.grid.columns.extent

    def merge(self, image_MLD: Tensor) -> Tensor:
        """Average the image tokens [P * V, L, D] of the views to those of the canvas [P, H * W, D]."""
        size = self.grid.rows.size, self.grid.columns.size
        cells = image_MLD.reshape(self.paths, self.views, *size, image_MLD.shape[-1])
        return merge_cells(cells, self.grid).flatten(1, 2)

    def split(self, canvas_PLD: Tensor) -> Tensor:
        """Return each view's part of the canvas: [P, H * W, D] to [P * V, L, D]."""
        cells = canvas_PLD.unflatten(1, (self.grid.rows.extent, -1))
        return split_cells(cells, self.grid).flatten(0, 1).flatten(1, 2)

    def mean(self, text_MTD: Tensor) -> Tensor:
        """Average the tokens of the prompts over the views: [P * V, T, D] to [P, T, D]."""
        return text_MTD.unflatten(0, (self.paths, self.views)).mean(1)

    def repeat(self, text_PTD: Tensor) -> Tensor:
        """Give each view the tokens of its prompt: [P, T, D] to [P * V, T, D]."""
        return text_PTD.repeat_interleave(self.views, 0)

    def first(self, values: Tensor) -> Tensor:
        """Return the values of each path's first view [P, ...] of [P * V, ...], for masks, which all views share."""
        return values.unflatten(0, (self.paths, self.views))[:, 0]


@dataclass
class TokenContext:
    """The pass that is running; all attention layers of one transformer share it."""

    current: TokenPass | None = None
    """None: each view attends separately, with the layer's own processor."""

    @contextmanager
    def running(self, token_pass: TokenPass | None) -> Iterator[None]:
        """Let the attention layers see `token_pass` within this context."""
        before, self.current = self.current, token_pass
        try:
            yield
        finally:
            self.current = before


class TokenAttention:
    """Attention processor that merges the views around a layer's own processor, `original`.

    Layers of two streams get `hidden_states` of the image and `encoder_hidden_states` of the prompt. Layers of one
    stream get both as `hidden_states`, the prompt first if `text_first`. Layers without a prompt get the image alone.
    """

    def __init__(self, name: str, original: Any, context: TokenContext, text_first: bool = True):
        self.name, self.original, self.context, self.text_first = name, original, context, text_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        """Run the layer; the arguments are those of diffusers' processors, which differ between families."""
        options = {
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "freqs_cis": freqs_cis,
        }
        options = {name: value for name, value in options.items() if value is not None}
        token_pass = self.context.current
        if token_pass is None or self.name not in token_pass.merged:
            return self.original(attn, hidden_states, encoder_hidden_states, **options)
        options = {name: self._on_canvas(name, value, token_pass) for name, value in options.items()}
        if encoder_hidden_states is None:
            return self._one_stream(
                hidden_states, token_pass, lambda hidden: self.original(attn, hidden, None, **options)
            )
        output = self.original(attn, token_pass.merge(hidden_states), token_pass.mean(encoder_hidden_states), **options)
        return token_pass.split(output[0]), token_pass.repeat(output[1])

    def _one_stream(self, hidden: Tensor, token_pass: TokenPass, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Merge one stream of image and prompt, call `attend` with it, and return each view's part."""
        image, text = self._apart(hidden, token_pass.view_tokens)
        canvas, prompt = token_pass.merge(image), token_pass.mean(text)
        output = attend(self._together(canvas, prompt))
        image, text = self._apart(output, canvas.shape[1])
        return self._together(token_pass.split(image), token_pass.repeat(text))

    def _apart(self, hidden: Tensor, image_tokens: int) -> tuple[Tensor, Tensor]:
        """Split one stream into the tokens of the image and those of the prompt."""
        text_tokens = hidden.shape[1] - image_tokens
        if self.text_first:
            return hidden[:, text_tokens:], hidden[:, :text_tokens]
        return hidden[:, :image_tokens], hidden[:, image_tokens:]

    def _together(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([text, image] if self.text_first else [image, text], dim=1)

    def _on_canvas(self, name: str, value: Any, token_pass: TokenPass) -> Any:
        """Return an option of the layer for the canvas: masks of each path, rotations of the canvas."""
        if name == "image_rotary_emb":
            return token_pass.rotary
        shared = token_pass.first(value)
        if name == "encoder_hidden_states_mask":
            return shared
        # One stream, the image first: its part is that of the canvas, and the rest stays.
        rest = shared[:, token_pass.view_tokens :]
        if name == "freqs_cis":
            image = token_pass.rotary.expand(len(rest), -1, -1)
        else:
            image = shared.new_ones((len(rest), token_pass.canvas_tokens), dtype=torch.bool)
        return torch.cat([image, rest], dim=1)
