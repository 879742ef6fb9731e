"""Describe a family of diffusion transformers: attention layers, limits of prompts, sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from madgen.backbones import BackboneSpec, Guidance, ModelSize, _vae
from madgen.backbones._family import Family
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._sizes import KL_PIXEL, KL_VAE_16
from madgen.hub import tokenizers
from madgen.hub.model_size import Parameters
from madgen.hub.tokenizers import TextLimit
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

VIEW_SIZE = 128
"""Latent cells of 1024 px, for transformers whose config does not name the size that they were trained at."""


def has_part(pretrained: str, index: Mapping[str, Any], part: str) -> bool:
    """Return whether a checkpoint has an optional part, such as a text encoder: in its index and in its folder."""
    folder = Path(pretrained)
    return bool((index.get(part) or [None])[0]) and (not folder.is_dir() or (folder / part).is_dir())


def transformer_spec(
    channels: int,
    view_size: int,
    guidance: Guidance,
    vae: Mapping[str, Any] | None = None,
    max_side: int | None = None,
    unguided_scale: float = 1.0,
    noise_patch: int = 1,
) -> BackboneSpec:
    """Return the shapes of a transformer with tokens of 2x2 latent cells; `vae` None: cells of 8x8 pixels."""
    factor = 8 if vae is None else _vae.factor_of(vae)
    return BackboneSpec(channels, factor, view_size, 2, guidance, 2, True, max_side, unguided_scale, noise_patch)


def activations_of(width: int, widths_alive: float) -> dict[str, Any]:
    """Return the fields of `ModelSize` about a pass of a transformer of some width, with tokens of 2x2 latent cells."""
    return {"per_cell": widths_alive * width / 4, "per_token": widths_alive * width}


def transformer_size(
    network: Parameters,
    encoders: tuple[Parameters, ...],
    width: int,
    widths_alive: float,
    vae: Parameters = KL_VAE_16,
    per_pixel: float = KL_PIXEL,
) -> ModelSize:
    """Return the size of a published transformer; see `widths_alive` of `TransformerFamily`."""
    return ModelSize(network, vae, encoders, per_pixel=per_pixel, **activations_of(width, widths_alive))


def stream_layers(config: Mapping[str, Any]) -> list[str]:
    """Return the attention layers of double stream blocks, then those of single stream ones."""
    return [
        *(f"transformer_blocks.{i}.attn" for i in range(config["num_layers"])),
        *(f"single_transformer_blocks.{i}.attn" for i in range(config["num_single_layers"])),
    ]


class TransformerFamily(Family):
    """A family of transformers that denoise by flow matching."""

    part = "transformer"
    flow: ClassVar[FlowSchedule | None] = FlowSchedule()
    sequence_length: ClassVar[int]
    """Tokens of the prompt that the text encoder reads by default, as in diffusers' pipeline."""
    max_length: ClassVar[int] = 512
    """Largest `backbone.max_sequence_length`."""
    limiting_part: ClassVar[str] = "tokenizer"
    """Name of the tokenizer that limits the prompt."""
    template_tokens: ClassVar[int] = 0
    """Tokens of `max_sequence_length` that a template puts before the prompt."""
    widths_alive: ClassVar[float]
    """Activations of a token at the peak of a pass, in units of the transformer's width; measured."""

    @staticmethod
    def layer_groups(layers: Sequence[str]) -> dict[str, list[str]]:
        """Return the groups of a transformer's layers, given in the order in which they run.

        `early`, `middle` and `late` are thirds by depth; `double` are blocks in which image and prompt have separate
        weights, `single` those in which they share them.
        """
        blocks = list(dict.fromkeys(layer.rpartition(".")[0] for layer in layers))
        groups: dict[str, list[str]] = {name: [] for name in ("early", "middle", "late", "double", "single")}
        for layer in layers:
            third = 3 * blocks.index(layer.rpartition(".")[0]) // len(blocks)
            groups[("early", "middle", "late")[third]].append(layer)
            groups["double" if layer.startswith("transformer_blocks.") else "single"].append(layer)
        return groups

    @classmethod
    def check_blocks(cls, blocks: Sequence[str], files: ModelFiles) -> None:
        cls.selected(cls.layer_names(cls.configs(files)[1]), blocks)

    @classmethod
    def text_limit(cls, files: ModelFiles, max_sequence_length: int | None = None) -> TextLimit | None:
        own = tokenizers.text_limit((cls.limiting_part,), files)
        length = cls.used_length(max_sequence_length, cls.max_length if own is None else own.tokens)
        return None if own is None else replace(own, tokens=max(0, length - cls.template_tokens), limits=())

    @classmethod
    def size(cls, files: ModelFiles, max_sequence_length: int | None) -> ModelSize:
        """Return what the models keep in memory, with as many tokens of the prompt as the text encoder may read."""
        own = tokenizers.text_limit((cls.limiting_part,), files)
        default = cls.sequence_length if own is None else cls.used_length(None, own.tokens)
        return replace(super().size(files, max_sequence_length), text_tokens=max_sequence_length or default)

    @classmethod
    def activations(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
        return activations_of(network["num_attention_heads"] * network["attention_head_dim"], cls.widths_alive)

    @classmethod
    def arguments(cls, max_sequence_length: int | None, offload: str) -> dict[str, Any]:
        """Return the arguments of the constructor. Raises UserError for a length that the family does not support."""
        cls.used_length(max_sequence_length, cls.max_length)
        return {"max_sequence_length": max_sequence_length, "offload": offload}

    @classmethod
    def used_length(cls, max_sequence_length: int | None, limit: int) -> int:
        """Return how many tokens the text encoder reads: the setting, or else the default.

        Raises UserError for a setting beyond the family's maximum or the tokenizer's `limit`.
        """
        limit = min(limit, cls.max_length)
        default = min(cls.sequence_length, limit)
        if max_sequence_length is not None and not cls.template_tokens < max_sequence_length <= limit:
            raise UserError(
                f"backbone.max_sequence_length={max_sequence_length} must be in {cls.template_tokens + 1}..{limit} "
                f"tokens; null is {default}"
            )
        return default if max_sequence_length is None else max_sequence_length

    @staticmethod
    @abstractmethod
    def layer_names(config: Mapping[str, Any]) -> list[str]:
        """Return the names of the attention layers that can merge, in the order they run in."""

    @staticmethod
    def separate_layers(config: Mapping[str, Any]) -> list[str]:
        """Return the names of attention layers that never merge, such as those of the prompt alone."""
        return []
