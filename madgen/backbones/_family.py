"""Describe a family of diffusers pipelines from config files: for planning, before any weights are loaded."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from madgen.backbones import BackboneSpec, ModelSize, SchedulerSettings, _schedulers, _vae, backbones_by_pipeline
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._loading import download
from madgen.hub.model_configs import read_configs, read_index
from madgen.hub.model_size import VAE, count_parts
from madgen.hub.repository import check_hub_id
from madgen.hub.weights import ModelFiles, single_file
from madgen.utils.errors import UserError

ALL = "all"
"""Entry of `method.mad.blocks` that selects every attention layer."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T = TypeVar("T")


def _of_name(values: Mapping[str, T], pretrained: str) -> T:
    return next(value for part, value in values.items() if part in pretrained.lower())


class Family(ABC):
    """Names, shapes and sizes of a family of checkpoints.

    With `load`, the class methods are the functions of `madgen.backbones.BackboneModule`, see there; families add
    `check_blocks` and `text_limit`.
    """

    name: ClassVar[str]
    """`backbone.name` of the job."""
    pipelines: ClassVar[tuple[str, ...]]
    """Classes of diffusers pipelines that can be loaded."""
    part: ClassVar[str]
    """Name of the denoising network in the pipeline, and of its folder."""
    flow: ClassVar[FlowSchedule | None] = None
    """Timesteps of a flow-matching model; None: the network predicts noise."""
    single_file_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"vae": VAE}
    """Models in a single file besides the network, with the beginnings of their tensor names."""
    assumed_specs: ClassVar[Mapping[str, BackboneSpec]]
    """Shapes of published checkpoints, by a part of their names in lower case; the first part that occurs counts."""
    assumed_sizes: ClassVar[Mapping[str, ModelSize]]
    """Their sizes, likewise."""

    own_scheduler = staticmethod(_schedulers.own_scheduler)

    @classmethod
    def scheduler_class(cls, name: str) -> Any:
        """Return a diffusers scheduler class by its name; UserError if it is unknown, which proposes one."""
        return _schedulers.scheduler_class(name, cls.flow is not None)

    @classmethod
    def download(cls, files: ModelFiles) -> list[Path]:
        return download(files, cls.single_file_parts)

    @classmethod
    def evaluated_steps(cls, own: dict[str, Any] | None, settings: SchedulerSettings) -> list[int]:
        return _schedulers.evaluated_steps(own, settings, cls.flow is not None)

    @classmethod
    def configs(cls, files: ModelFiles) -> tuple[dict[str, Any], ...]:
        """Read the config files of the pipeline, its network and its VAE; UserError if it is not such a model."""
        cls._check_class(read_index(files).get("_class_name"), files.pretrained)
        return read_configs(files, ("model_index.json", f"{cls.part}/config.json", "vae/config.json"))

    @classmethod
    def _check_class(cls, actual: str | None, pretrained: str) -> None:
        """Raise UserError if the pipeline of a checkpoint is not of this family; it names the family that it is of."""
        if actual in cls.pipelines:
            return
        other = backbones_by_pipeline().get(str(actual), cls).name
        raise UserError(
            f"backbone.pretrained={pretrained} is a {actual}; backbone.name={cls.name} loads "
            f"{' and '.join(cls.pipelines)}" + ("" if other == cls.name else f"; set backbone.name={other}")
        )

    @staticmethod
    @abstractmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        """Read the shapes from the configs of the pipeline, its network and its VAE."""

    @classmethod
    def describe(cls, files: ModelFiles) -> BackboneSpec:
        return cls.spec_of(*cls.configs(files))

    @classmethod
    def family_spec(cls, pretrained: str) -> BackboneSpec:
        """Return the shapes of published checkpoints; UserError for neither a Hub id nor a single file."""
        if single_file(pretrained) is None:
            check_hub_id(pretrained)
        return _of_name(cls.assumed_specs, pretrained)

    @classmethod
    def size(cls, files: ModelFiles, max_sequence_length: int | None) -> ModelSize:
        assumed = _of_name(cls.assumed_sizes, files.pretrained)
        try:
            _, network, vae = cls.configs(files)
        except UserError:
            return assumed
        with suppress(UserError):  # damaged files are refused where they are loaded
            counts = count_parts(files, cls.part, cls.single_file_parts)
            encoders = tuple(counts[part] for part in TEXT_ENCODERS if part in counts)
            assumed = replace(
                assumed,
                network=counts.get(cls.part, assumed.network),
                vae=counts.get("vae", assumed.vae),
                text_encoders=encoders or assumed.text_encoders,
            )
        return replace(assumed, **cls.activations(network, vae), per_pixel=_vae.decoder_activations(vae))

    @classmethod
    @abstractmethod
    def activations(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `ModelSize` about a pass, from the configs of the network and of the VAE."""

    @staticmethod
    @abstractmethod
    def layer_groups(layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Return the groups of attention layers that entries of `method.mad.blocks` may name."""

    @classmethod
    def selected(cls, layers: Sequence[str], blocks: Sequence[str]) -> frozenset[str]:
        """Return the layers that `blocks` select: `all`, names of groups, or patterns of names of layers.

        Raises UserError for an entry that selects none.
        """
        groups, chosen = cls.layer_groups(layers), set[str]()
        for block in blocks:
            if block == ALL or block in groups:
                matches = layers if block == ALL else groups[block]
            else:  # diffusers appends `.processor` to the names of layers
                names = {name: name.removesuffix(".processor") for name in layers}
                matches = [name for name in layers if fnmatch.filter((names[name], f"{names[name]}.processor"), block)]
            if not matches and block in groups:
                raise UserError(f"method.mad.blocks: {block!r} of this backbone has no attention layers; remove it")
            if not matches:
                raise UserError(
                    f"method.mad.blocks: {block!r} is neither {', '.join(groups)} nor a pattern of a layer such as "
                    f"{layers[0]!r}; {ALL} selects every layer"
                )
            chosen.update(matches)
        return frozenset(chosen)

    @classmethod
    @abstractmethod
    def arguments(cls, max_sequence_length: int | None, offload: str) -> dict[str, Any]:
        """Return the further arguments of the constructor. Raises UserError for settings that do not apply."""
