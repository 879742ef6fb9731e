"""The settings of `method` that the sampler uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict, get_type_hints

from madgen.config.schema import (
    BlendConfig,
    MadConfig,
    MergeConfig,
    MethodConfig,
    RegionsConfig,
    SamplingConfig,
    SyncConfig,
    ViewsConfig,
    share_of_steps,
)
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
    sections: dict[str, dict[str, Any]] = {"views": {}, "mad": {}, "sync": {}, "regions": {}}
    for name, value in options.items():
        path, validated = METHOD_OPTIONS[name]
        section, _, key = path.partition(".")
        sections[section][key] = validated(name, value)
    return MethodConfig(
        views=ViewsConfig(**sections["views"]),
        mad=MadConfig(**sections["mad"]),
        sync=SyncConfig(**sections["sync"]),
        regions=RegionsConfig(**sections["regions"]),
    )


@dataclass(frozen=True)
class Method:
    """Merged attention and predictions, SyncDiffusion and bootstrapping of regions; see `method` of the job."""

    merging: Merging
    sync: SyncConfig | None = None
    bootstrapping: int | None = None
    merge: MergeConfig = field(default_factory=MergeConfig)
    align: float = 0.0
    """Share of one view's noise in the initial noise."""
    blend: BlendConfig = field(default_factory=BlendConfig)
    """Blending of the initial noise with that of a second seed."""
    share: float | None = None
    """Share of the steps in which attention is merged; None: `merging.steps` of any number of steps."""

    def __post_init__(self) -> None:
        if self.bootstrapping is not None and self.bootstrapping < 0:
            raise UserError(f"region_bootstrapping must be >= 0 steps or None, got {self.bootstrapping}")

    @classmethod
    def from_config(cls, config: MethodConfig) -> Method:
        """Convert the keys of a job; the views are part of `Geometry`."""
        config = config.with_steps(SamplingConfig.num_inference_steps) if config.mad.share is not None else config
        mad, sync = config.mad, config.sync if config.sync.weight else None
        merging = Merging(mad.merged_steps, tuple(mad.blocks), mad.cross_attention, mad.positions)
        bootstrapping, noise = config.regions.bootstrapping, config.noise
        return cls(merging, sync, bootstrapping, config.merge, noise.align, noise.blend, mad.requested_share)

    def for_steps(self, num_inference_steps: int) -> Method:
        """Return the method with attention merged in its share of this number of steps."""
        if self.share is None:
            return self
        merging = replace(self.merging, steps=share_of_steps(self.share, num_inference_steps))
        return replace(self, merging=merging)

    @property
    def draws_view_noise(self) -> bool:
        """Return whether the noise of one view is drawn after the noise of the canvas."""
        return self.align > 0 or self.merge.reference_steps > 0

    def check_regions(self, regions: Iterable[Sized]) -> None:
        """Raise UserError if panoramas have regions that the reference view would overwrite."""
        if self.merge.reference_steps and any(map(len, regions)):
            raise UserError(
                f"method.merge.reference_steps={self.merge.reference_steps} would put rows of the panorama's prompt "
                "into its regions; set it to 0, or remove the regions"
            )

    def check_adapters(self, controlled: bool, styled: bool) -> None:
        """Raise UserError if the method does not support a ControlNet, or an IP-Adapter."""
        if controlled and self.merge.reference_steps:
            raise UserError(
                f"method.merge.reference_steps={self.merge.reference_steps} denoises a view outside of the panorama, "
                "which a ControlNet has no picture for; set it to 0"
            )
        if (controlled or styled) and self.sync is not None:
            adapter = "a ControlNet" if controlled else "an IP-Adapter"
            raise UserError(f"method.sync is not supported with {adapter}; set method.sync.weight to 0")

    def excess_steps(self, steps: int, described: str, layout: str) -> list[str]:
        """Describe settings for more steps than run; `described`: their number for messages, `layout`: of the views."""
        sync, notes = self.sync, list[str]()
        if self.share is None and self.merging.steps > steps and layout != "whole":
            setting = f"method.mad.steps={self.merging.steps}"
            fix = "set method.mad.share for a share of the steps"
            notes.append(f"{setting} is more than {described}: MAD is in all of them; {fix}")
        if sync is not None and sync.every > min(sync.steps, steps):
            limit = f"method.sync.steps={sync.steps}" if sync.steps < steps else described
            notes.append(f"method.sync.every={sync.every} is more than {limit}: SyncDiffusion is in no step; lower it")
        elif sync is not None and sync.steps > steps:
            notes.append(f"method.sync.steps={sync.steps} is more than {described}: SyncDiffusion is in all of them")
        if self.bootstrapping is not None and self.bootstrapping > steps:
            name = f"method.regions.bootstrapping={self.bootstrapping}"
            notes.append(f"{name} is more than {described}: regions are bootstrapped in all of them")
        return notes

    def bootstrapped_steps(self, num_inference_steps: int) -> int:
        """Return the number of bootstrapped steps; default: two fifths, like the released code (20 of 50)."""
        steps = round(0.4 * num_inference_steps) if self.bootstrapping is None else self.bootstrapping
        return min(steps, num_inference_steps)
