"""The prompts of a batch as a UNet takes them, and what guidance makes of its passes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from madgen.diffusion.attention import KeysValues
from madgen.diffusion.guidance import classifier_free


@dataclass(frozen=True)
class Embedded:
    """Prompts as the UNet takes them: the text encoders' hidden states, and their summary where it takes one."""

    hidden_NTD: Tensor
    pooled_ND: Tensor | None = None


class Shared:
    """Which negative prompt each of B prompts has, where they have U < B: one for those that see the same views."""

    def __init__(self, seen: Sequence[Hashable], negatives: Sequence[Hashable], device: torch.device):
        """`seen` names the views of each prompt, `negatives` its negative prompt."""
        numbers: dict[Hashable, int] = {}
        self.own = [numbers.setdefault(key, len(numbers)) for key in zip(seen, negatives, strict=True)]
        self.firsts = [self.own.index(number) for number in numbers.values()]
        self.own_B = torch.tensor(self.own, device=device)
        self.firsts_U = torch.tensor(self.firsts, device=device)

    def __bool__(self) -> bool:
        return len(self.firsts) < len(self.own)


@dataclass
class Conditioning:
    """The prompts of a batch, N paths: with classifier-free guidance U negative ones, then B prompts; else N = B."""

    embeddings_NTD: Tensor
    guidance_scale: float
    embedded_guidance_BD: Tensor | None = None
    pooled_ND: Tensor | None = None
    keys_values: Mapping[str, KeysValues] = field(default_factory=dict)
    """Of the prompts, for each cross-attention layer: projected once for all views and steps."""
    negatives: int = 0
    """U: with classifier-free guidance B, or fewer where prompts share them."""
    shared: Shared | None = None
    """How they do, if they do."""
    conditions: dict[tuple[int, int, int], dict[str, Tensor] | None] = field(default_factory=dict)
    """What else the UNet is told of views, by their number and size: made once for all steps."""

    @property
    def paths(self) -> int:
        """N: how many UNet passes a view takes."""
        return self.embeddings_NTD.shape[0]

    def views(self, views_BVChw: Tensor) -> Tensor:
        """Those that each path sees [N, V, C, h, w]."""
        if not self.negatives:
            return views_BVChw
        first = views_BVChw if self.shared is None else views_BVChw[self.shared.firsts_U]
        return torch.cat([first, views_BVChw])

    def guided(self, noise_NVChw: Tensor) -> Tensor:
        """Classifier-free guidance [B, V, C, h, w] of all paths, where there is any."""
        if not self.negatives:
            return noise_NVChw
        unconditional, conditional = noise_NVChw.split([self.negatives, self.paths - self.negatives])
        if self.shared is not None:
            unconditional = unconditional[self.shared.own_B]
        return classifier_free(unconditional, conditional, self.guidance_scale)

    def picked(self, paths: slice | Tensor, negatives: int = 0, shared: Shared | None = None) -> Conditioning:
        """Some of the paths by themselves, the first `negatives` of them negative prompts."""
        embedded, pooled = self.embedded_guidance_BD, self.pooled_ND
        return replace(
            self,
            embeddings_NTD=self.embeddings_NTD[paths],
            embedded_guidance_BD=None if embedded is None else embedded[paths],
            pooled_ND=None if pooled is None else pooled[paths],
            keys_values={name: (key[paths], value[paths]) for name, (key, value) in self.keys_values.items()},
            negatives=negatives,
            shared=shared,
            conditions={},
        )

    def where(self, seen: Sequence[Hashable]) -> Conditioning:
        """See `madgen.backbones.Conditioning`."""
        if self.shared is None:
            return self
        device = self.embeddings_NTD.device
        shared = Shared(seen, self.shared.own, device)
        negatives = [self.shared.own[first] for first in shared.firsts]
        paths = torch.tensor([*negatives, *range(self.negatives, self.paths)], device=device)
        return self.picked(paths, len(negatives), shared or None)

    def unguided(self) -> Conditioning:
        """See `madgen.backbones.Conditioning`."""
        return self.picked(slice(self.negatives, None))
