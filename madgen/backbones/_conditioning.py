"""The prompts of a batch as a UNet takes them, and what guidance makes of its passes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from madgen.joint.attention import KeysValues
from madgen.joint.guidance import classifier_free


@dataclass(frozen=True)
class Embedded:
    """Prompts as the UNet takes them: the text encoders' hidden states, and their summary where it takes one."""

    hidden_NTD: Tensor
    pooled_ND: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """Negative prompts that several of B prompts have in common, on the same views: one pass is enough for each."""

    first_U: Tensor
    """The first prompt that has it."""
    negative_B: Tensor
    """Which one each prompt has."""


@dataclass
class Conditioning:
    """The prompts of a batch, N paths: with classifier-free guidance U negative ones, then B prompts; else N = B.

    U = B, or where prompts share their negative ones U < B.
    """

    embeddings_NTD: Tensor
    guidance_scale: float
    embedded_guidance_BD: Tensor | None = None
    pooled_ND: Tensor | None = None
    keys_values: Mapping[str, KeysValues] = field(default_factory=dict)
    """Of the prompts, for each cross-attention layer: projected once for all views and steps."""
    shared: Shared | None = None
    conditions: dict[tuple[int, int, int], dict[str, Tensor] | None] = field(default_factory=dict)
    """What else the UNet is told of views, by their number and size: made once for all steps."""

    @property
    def paths(self) -> int:
        """How many UNet passes a view takes: N / B is 2 with classifier-free guidance that nothing shares."""
        return self.embeddings_NTD.shape[0]

    def views(self, views_BVChw: Tensor) -> Tensor:
        """Those that each path sees [N, V, C, h, w]."""
        if self.paths == len(views_BVChw):
            return views_BVChw
        first = views_BVChw if self.shared is None else views_BVChw[self.shared.first_U]
        return torch.cat([first, views_BVChw])

    def guided(self, noise_NVChw: Tensor, batch: int) -> Tensor:
        """Classifier-free guidance [B, V, C, h, w] of all paths, where there is any."""
        if self.paths == batch:
            return noise_NVChw
        unconditional, conditional = noise_NVChw.split([self.paths - batch, batch])
        if self.shared is not None:
            unconditional = unconditional[self.shared.negative_B]
        return classifier_free(unconditional, conditional, self.guidance_scale)

    def picked(self, paths: slice | Tensor) -> Conditioning:
        """Some of the paths by themselves."""
        embedded, pooled = self.embedded_guidance_BD, self.pooled_ND
        return replace(
            self,
            embeddings_NTD=self.embeddings_NTD[paths],
            embedded_guidance_BD=None if embedded is None else embedded[paths],
            pooled_ND=None if pooled is None else pooled[paths],
            keys_values={name: (key[paths], value[paths]) for name, (key, value) in self.keys_values.items()},
            shared=None,
            conditions={},
        )

    def apart(self) -> Conditioning:
        """Every prompt with a negative one of its own, for views that differ."""
        if self.shared is None:
            return self
        negatives, prompts = len(self.shared.first_U), torch.arange(len(self.shared.negative_B))
        return self.picked(torch.cat([self.shared.negative_B, negatives + prompts.to(self.shared.negative_B.device)]))

    def unguided(self) -> Conditioning:
        """The prompts without the negative ones, of classifier-free guidance."""
        negatives = self.paths // 2 if self.shared is None else len(self.shared.first_U)
        return self.picked(slice(negatives, None))


def shared(negatives: Sequence[str], canvases: Sequence[Hashable], device: torch.device) -> Shared | None:
    """What prompts share whose canvas and negative prompt are the same; None if nothing."""
    keys = list(zip(canvases, negatives, strict=True))
    distinct = list(dict.fromkeys(keys))
    if len(distinct) == len(keys):
        return None
    first, own = [keys.index(key) for key in distinct], [distinct.index(key) for key in keys]
    return Shared(torch.tensor(first, device=device), torch.tensor(own, device=device))
