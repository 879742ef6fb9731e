"""Pretrained diffusion models. The file name is the registry key: `backbones/sd.py` is `backbone.name: sd`.

A backbone module has `describe(...) -> BackboneSpec` (reads config files only), `family_spec(...)`, `load(...) ->
Backbone`, `scheduler_class`, `check_blocks` and what else CONTRIBUTING.md lists. What several share lies in modules
whose names begin with `_`. The only home of diffusers and transformers besides `madgen.demo`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from madgen.diffusion.views import Views
from madgen.utils.errors import UserError
from madgen.utils.validation import number, path


@dataclass(frozen=True)
class BackboneSpec:
    """The shapes of a backbone, read from its config files."""

    channels: int
    """Of the latents."""
    factor: int
    """Pixels to a latent cell."""
    view_size: int
    """Latent cells: the size that the UNet was trained at."""
    coarsest: int
    """Latent cells to a cell of the UNet's lowest level."""
    guidance_embedded: bool
    """Guidance goes in as an embedding (consistency models): no second pass, no negative prompt."""


@dataclass(frozen=True)
class Merging:
    """Which attention layers merge, and when: see `method.mad` of the job."""

    steps: int
    blocks: tuple[str, ...]
    cross_attention: str

    def last_step(self) -> int:
        """In no step from this one on does any layer merge."""
        return sys.maxsize if self.cross_attention == "always" else self.steps


@dataclass(frozen=True)
class Lora:
    """A low-rank adaptation that is fused into a backbone's weights when it is loaded."""

    weights: str
    """A `.safetensors` file, a folder that holds one, or a hub id."""
    scale: float = 1.0


def as_lora(value: Lora | Mapping[str, Any]) -> Lora:
    """`{"weights": ..., "scale": ...}` as a Lora; UserError for other keys or values."""
    given = vars(value) if isinstance(value, Lora) else value
    if not isinstance(given, Mapping) or not {"weights"} <= set(given) <= {"weights", "scale"}:
        raise UserError(f"a LoRA is {{weights: ..., scale: ...}}, got {value!r}")
    return Lora(path("a LoRA's weights", given["weights"]), number("a LoRA's scale", given.get("scale", 1.0)))


class Conditioning(Protocol):
    """The prompts of a batch, as a backbone keeps them."""

    def where(self, seen: Sequence[Hashable]) -> Conditioning:
        """The same prompts in steps in which fewer of them see the same views; `seen` as in `encode_prompts`."""

    def unguided(self) -> Conditioning:
        """The same prompts without guidance."""


class Backbone(Protocol):
    """What the sampler needs of a pretrained model."""

    spec: BackboneSpec
    device: torch.device
    dtype: torch.dtype

    def encode_prompts(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        seen: Sequence[Hashable] | None = None,
    ) -> Any:
        """What `predict_noise` is conditioned on, a `Conditioning`; computed once a batch.

        `seen` names the views that each prompt will see: those of one name see the same. None: each sees its own.
        """

    def cut_text(self, prompt: str) -> str | None:
        """The end of a prompt that a text encoder never sees, None if it sees all of it."""

    def compile(self) -> None:
        """From now on views are denoised and panoramas decoded in compiled graphs, made when a size is first met."""

    def merged_attention(
        self, views: Views, step: int, merging: Merging, conditioning: Any
    ) -> AbstractContextManager[None]:
        """Runs the UNet over `views`, attention merged where `merging` says so at this step."""

    def predict_noise(
        self, views_BVChw: Tensor, timestep: Tensor, conditioning: Any, chunk_views: int | None = None
    ) -> Tensor:
        """float32 [B, V, C, h, w], guidance applied. Gradients flow, unless they are switched off around it.

        `chunk_views` bounds the memory: one prompt at a time, and at most so many views where attention merges none.
        """

    def in_float32(self) -> AbstractContextManager[None]:
        """Within it everything is computed in float32; afterwards precision and weights are what they were."""

    def release_memory(self) -> bool:
        """Gives back what is held for speed alone; False if there is nothing."""

    def forgo_graphs(self) -> None:
        """From now on nothing is held for speed alone."""

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Pixels in 0..1, float32 [B, 3, H * factor, W * factor]; a loop's ends see `wrap` cells of each other.

        `tiled` bounds the memory by decoding tile by tile. Gradients flow, unless they are switched off around it.
        """

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Latents float32 [B, C, H / factor, W / factor] of pixels in 0..1."""

    def new_scheduler(
        self, name: str | None, num_inference_steps: int, original_inference_steps: int | None = None
    ) -> Any:
        """A fresh scheduler with its timesteps set."""


def backbone_module(name: str) -> Any:
    """The module `madgen.backbones.<name>`; UserError lists the known ones."""
    known = sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_" and not module.ispkg
    )
    if name not in known:
        raise UserError(f"backbone.name must be one of {', '.join(known)}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def quieten() -> None:
    """The model libraries report errors only, and draw no progress bars for loading."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
