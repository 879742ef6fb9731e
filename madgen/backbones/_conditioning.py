"""Encoded prompts of a batch, and classifier-free guidance over the paths of a pass of the network."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from madgen.diffusion.attention import KeysValues
from madgen.diffusion.guidance import classifier_free
from madgen.diffusion.merge import split
from madgen.diffusion.views import Views
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Embedded:
    """Text embeddings: the hidden states, and the pooled embedding if the network takes one."""

    hidden_NTD: Tensor
    pooled_ND: Tensor | None = None

    def to(self, device: torch.device) -> Embedded:
        """Move all tensors to a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)


def stack(paths: Sequence[Embedded], pads: bool = False) -> tuple[Tensor, Tensor | None, tuple[int, ...] | None]:
    """Return the hidden states of all paths, the pooled embeddings, and the lengths if they differ.

    Shorter hidden states are padded with zeros if `pads`, otherwise they raise UserError.
    """
    lengths = tuple(path.hidden_NTD.shape[1] for path in paths for _ in path.hidden_NTD)
    longest, differ = max(lengths), len(set(lengths)) > 1
    if differ and not pads:
        raise UserError(
            f"prompt_embeds and negative_prompt_embeds must have equally many tokens, got {min(lengths)} and "
            f"{longest}; pass both"
        )
    hidden = [
        torch.nn.functional.pad(each, (0, 0, 0, longest - each.shape[1]))
        for each in (path.hidden_NTD for path in paths)
    ]
    pooled = [path.pooled_ND for path in paths if path.pooled_ND is not None]
    return torch.cat(hidden), torch.cat(pooled) if pooled else None, lengths if differ else None


class SharedNegatives:
    """Map B prompts to U <= B unconditional paths: prompts with equal views and negative prompts share one."""

    def __init__(self, view_ids: Sequence[Hashable], negatives: Sequence[Hashable], device: torch.device):
        numbers: dict[Hashable, int] = {}
        self.own = [numbers.setdefault(key, len(numbers)) for key in zip(view_ids, negatives, strict=True)]
        self.firsts = [self.own.index(number) for number in numbers.values()]
        self.own_B = torch.tensor(self.own, device=device)
        self.firsts_U = torch.tensor(self.firsts, device=device)

    def __bool__(self) -> bool:
        return len(self.firsts) < len(self.own)


def _of_paths(keys_values: Mapping[str, KeysValues], paths: slice | Tensor) -> dict[str, KeysValues]:
    """Return the keys and values of some of the paths."""
    return {name: (key[paths], value[paths]) for name, (key, value) in keys_values.items()}


@dataclass
class Control:
    """Control pictures of the paths of a pass."""

    canvases_P3HW: Tensor
    """Pixels of the panoramas in 0..1, as large as the canvas."""
    panoramas_N: Tensor
    """The panorama of each path."""
    scale: float
    steps: Container[int]
    """Denoising steps in which the pictures act."""
    keys_values: Mapping[str, KeysValues]
    """Keys and values of the prompts for each cross-attention layer of the ControlNet."""
    _crops: dict[Views, Tensor] = field(default_factory=dict)
    """Crops of the last views."""

    def select(self, paths: slice | Tensor) -> Control:
        """Return some of the paths."""
        keys_values = _of_paths(self.keys_values, paths)
        return replace(self, panoramas_N=self.panoramas_N[paths], keys_values=keys_values, _crops={})

    def crops(self, views: Views, factor: int) -> Tensor:
        """Return the part of its picture that each view sees, [N, V, 3, h * factor, w * factor]."""
        if views not in self._crops:
            self._crops.clear()
            self._crops[views] = split(self.canvases_P3HW[self.panoramas_N], views.enlarged(factor))
        return self._crops[views]


@dataclass
class Conditioning:
    """N paths of a batch: with classifier-free guidance U negative prompts, then B prompts; otherwise N = B.

    Implements `madgen.backbones.Conditioning`.
    """

    embeddings_NTD: Tensor
    guidance_scale: float
    embedded_guidance_BD: Tensor | None = None
    pooled_ND: Tensor | None = None
    keys_values: Mapping[str, KeysValues] = field(default_factory=dict)
    """Keys and values for each cross-attention layer, projected once for all views and steps."""
    negatives: int = 0
    """U: number of negative prompts."""
    shared: SharedNegatives | None = None
    """Maps prompts to negative prompts; None if U is B or 0."""
    conditions: dict[tuple[int, int, int], dict[str, Tensor] | None] = field(default_factory=dict)
    """Additional conditions of the UNet by number and size of views, computed once for all steps."""
    lengths: tuple[int, ...] | None = None
    """Number of tokens of each path's prompt; None: equally many, no embedding is padded."""
    guide: Callable[[Tensor, Tensor, float], Tensor] = classifier_free
    """Combines the predictions without and with the prompt, at a guidance scale."""
    control: Control | None = None
    """Control pictures of a ControlNet."""
    style: Mapping[str, KeysValues] = field(default_factory=dict)
    """Keys and values of the style pictures of an IP-Adapter for each cross-attention layer."""
    style_scale: float = 1.0
    """Weight of what is attended in the style pictures."""

    @property
    def text_mask_NT(self) -> Tensor | None:
        """Which embeddings are tokens of the prompt, not padding; None: all."""
        if self.lengths is None:
            return None
        device = self.embeddings_NTD.device
        lengths_N = torch.tensor(self.lengths, device=device)
        return torch.arange(self.embeddings_NTD.shape[1], device=device) < lengths_N[:, None]

    @property
    def paths(self) -> int:
        """N: number of evaluations of a view."""
        return self.embeddings_NTD.shape[0]

    def views(self, views_BVChw: Tensor) -> Tensor:
        """Repeat the views for each path: [N, V, C, h, w]."""
        if not self.negatives:
            return views_BVChw
        first = views_BVChw if self.shared is None else views_BVChw[self.shared.firsts_U]
        return torch.cat([first, views_BVChw])

    def guided(self, noise_NVChw: Tensor) -> Tensor:
        """Combine the paths by classifier-free guidance, if enabled: [B, V, C, h, w]."""
        if not self.negatives:
            return noise_NVChw
        unconditional, conditional = noise_NVChw.split([self.negatives, self.paths - self.negatives])
        if self.shared is not None:
            unconditional = unconditional[self.shared.own_B]
        return self.guide(unconditional, conditional, self.guidance_scale)

    def select(self, paths: slice | Tensor, negatives: int = 0, shared: SharedNegatives | None = None) -> Conditioning:
        """Return some of the paths, the first `negatives` of them negative prompts."""
        embedded, pooled, lengths = self.embedded_guidance_BD, self.pooled_ND, self.lengths
        if lengths is not None:
            chosen = range(len(lengths))[paths] if isinstance(paths, slice) else paths.tolist()
            lengths = tuple(lengths[path] for path in chosen)
        return replace(
            self,
            embeddings_NTD=self.embeddings_NTD[paths],
            embedded_guidance_BD=None if embedded is None else embedded[paths],
            pooled_ND=None if pooled is None else pooled[paths],
            keys_values=_of_paths(self.keys_values, paths),
            negatives=negatives,
            shared=shared,
            conditions={},
            lengths=lengths,
            control=None if self.control is None else self.control.select(paths),
            style=_of_paths(self.style, paths),
        )

    def regrouped(self, view_ids: Sequence[Hashable]) -> Conditioning:
        if self.shared is None:
            return self
        device = self.embeddings_NTD.device
        shared = SharedNegatives(view_ids, self.shared.own, device)
        negatives = [self.shared.own[first] for first in shared.firsts]
        paths = torch.tensor([*negatives, *range(self.negatives, self.paths)], device=device)
        return self.select(paths, len(negatives), shared or None)

    def unguided(self) -> Conditioning:
        return self.select(slice(self.negatives, None))
