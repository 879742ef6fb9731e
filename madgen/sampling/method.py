"""The settings of `method` that the sampler uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, TypedDict, get_type_hints

from madgen.config.schema import MethodConfig, SamplingConfig, SyncConfig
from madgen.diffusion.attention import Merging
from madgen.utils.errors import UserError
from madgen.utils.validation import number, texts, whole, whole_or_none


def _unchanged(name: str, value: Any) -> Any:
    """Return a value that its config validates."""
    return value


def _tuple_of_texts(name: str, value: Any) -> tuple[str, ...]:
    return tuple(texts(name, value))


class MethodOptions(TypedDict, total=False):
    """Arguments for keys of `method` in a job, with the key and the validation of each."""

    layout: Annotated[str, "views.layout", _unchanged]
    view_size: Annotated[int | None, "views.size", whole_or_none]
    stride: Annotated[int | None, "views.stride", whole_or_none]
    overlap_from: Annotated[int | None, "views.overlap_from", whole_or_none]
    mad_steps: Annotated[int, "mad.steps", whole]
    mad_blocks: Annotated[Sequence[str], "mad.blocks", _tuple_of_texts]
    cross_attention: Annotated[str, "mad.cross_attention", _unchanged]
    positions: Annotated[str, "mad.positions", _unchanged]
    sync_weight: Annotated[float, "sync.weight", number]
    sync_decay: Annotated[float, "sync.decay", number]
    sync_steps: Annotated[int, "sync.steps", whole]
    sync_every: Annotated[int, "sync.every", whole]
    sync_network: Annotated[str, "sync.network", _unchanged]
    region_bootstrapping: Annotated[int | None, "regions.bootstrapping", whole_or_none]


METHOD_OPTIONS = {name: hint.__metadata__ for name, hint in get_type_hints(MethodOptions, include_extras=True).items()}
"""Key and validation of each argument."""


def method_config(**options: Any) -> MethodConfig:
    """Build the config of a method from `MethodOptions`; absent ones have their defaults.

    Raises UserError for invalid values, and TypeError for unknown arguments.
    """
    if unknown := sorted(options.keys() - METHOD_OPTIONS):
        raise TypeError(f"unexpected argument {unknown[0]!r}")
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        path, validated = METHOD_OPTIONS[name]
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = validated(name, value)
    config = MethodConfig()
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


@dataclass(frozen=True)
class Method:
    """`method` of a job, and what the sampler derives from it; the views are part of `Geometry`."""

    config: MethodConfig

    @classmethod
    def from_config(cls, config: MethodConfig) -> Method:
        """Return the method of a config; `mad.share` is converted for the default number of steps."""
        return cls(config if config.mad.share is None else config.with_steps(SamplingConfig.num_inference_steps))

    def for_steps(self, num_inference_steps: int) -> Method:
        """Return the method with attention merged in its share of this number of steps; itself if it has no share."""
        return self if self.config.mad.requested_share is None else Method(self.config.with_steps(num_inference_steps))

    @cached_property
    def merging(self) -> Merging:
        """The attention layers that merge, and their steps."""
        mad = self.config.mad
        return Merging(mad.merged_steps, tuple(mad.blocks), mad.cross_attention, mad.positions)

    @property
    def sync(self) -> SyncConfig | None:
        """The settings of SyncDiffusion; None: it is off."""
        return self.config.sync if self.config.sync.weight else None

    @property
    def draws_view_noise(self) -> bool:
        """Return whether the noise of one view is drawn after the noise of the canvas."""
        return self.config.noise.align > 0 or self.config.merge.reference_steps > 0

    def check_regions(self, regions: Iterable[Sized]) -> None:
        """Raise UserError if panoramas have regions that the reference view would overwrite."""
        steps = self.config.merge.reference_steps
        if steps and any(map(len, regions)):
            raise UserError(
                f"method.merge.reference_steps={steps} would put rows of the panorama's prompt "
                "into its regions; set it to 0, or remove the regions"
            )

    def check_adapters(self, controlled: bool, styled: bool) -> None:
        """Raise UserError if the method does not support a ControlNet, or an IP-Adapter."""
        steps = self.config.merge.reference_steps
        if controlled and steps:
            raise UserError(
                f"method.merge.reference_steps={steps} denoises a view outside of the panorama, "
                "which a ControlNet has no picture for; set it to 0"
            )
        if (controlled or styled) and self.sync is not None:
            adapter = "a ControlNet" if controlled else "an IP-Adapter"
            raise UserError(f"method.sync is not supported with {adapter}; set method.sync.weight to 0")

    def excess_steps(self, steps: int, described: str, layout: str) -> list[str]:
        """Describe settings for more steps than run; `described`: their number for messages, `layout`: of the views."""
        sync, bootstrapping, notes = self.sync, self.config.regions.bootstrapping, list[str]()
        if self.config.mad.requested_share is None and self.merging.steps > steps and layout != "whole":
            setting = f"method.mad.steps={self.merging.steps}"
            fix = "set method.mad.share for a share of the steps"
            notes.append(f"{setting} is more than {described}: MAD is in all of them; {fix}")
        if sync is not None and sync.every > min(sync.steps, steps):
            limit = f"method.sync.steps={sync.steps}" if sync.steps < steps else described
            notes.append(f"method.sync.every={sync.every} is more than {limit}: SyncDiffusion is in no step; lower it")
        elif sync is not None and sync.steps > steps:
            notes.append(f"method.sync.steps={sync.steps} is more than {described}: SyncDiffusion is in all of them")
        if bootstrapping is not None and bootstrapping > steps:
            name = f"method.regions.bootstrapping={bootstrapping}"
            notes.append(f"{name} is more than {described}: regions are bootstrapped in all of them")
        return notes

    def bootstrapped_steps(self, num_inference_steps: int) -> int:
        """Return the number of bootstrapped steps; default: two fifths, like the released code (20 of 50)."""
        requested = self.config.regions.bootstrapping
        return min(round(0.4 * num_inference_steps) if requested is None else requested, num_inference_steps)
