"""`method`: how the views are sampled jointly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from madgen.config.schema.checks import as_yaml, changed, check, check_one_of, quoted
from madgen.config.schema.sampling import SamplingParams
from madgen.types import NoiseBlend


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The views that the canvas is split into."""

    layout: str = "overlapping"
    """`overlapping`: the same overlapping views in each step (MultiDiffusion). `shifted`: adjacent views that move in
    each step (SpotDiffusion), by multiples of `stride` while attention is merged and by any number of latent cells
    otherwise. `whole`: a single view, the whole canvas (direct inference)."""
    size: int | None = None
    """Height and width of a view in latent cells, > 0; null is the size that the backbone was trained at."""
    stride: int | None = None
    """Distance between neighbouring views in latent cells, > 0; null is a quarter of `size`. Must be null where it has
    no effect: with `whole`, and with `shifted` views without MAD and without `overlap_from`."""
    overlap_from: int | None = None
    """First step, counted from 0, in which `shifted` views overlap by `stride` instead, to blend the last borders.
    null: in no step."""

    def __post_init__(self) -> None:
        check_one_of("method.views.layout", self.layout, ("overlapping", "shifted", "whole"))
        first = self.overlap_from
        check(
            first is None or (first >= 0 and self.layout == "shifted"),
            f"method.views.overlap_from must be a step >= 0 and needs layout=shifted, got {first} with "
            f"layout={self.layout}; set it to null",
        )
        for name in ("size", "stride"):
            value = getattr(self, name)
            check(value is None or value > 0, f"method.views.{name} must be > 0 latent cells, got {value}")


def share_of_steps(share: float, num_inference_steps: int) -> int:
    """Return a share of the steps, rounded to whole steps."""
    return int(share * num_inference_steps + 0.5)


class DefaultSteps(int):
    """The default of `method.mad.steps`, which differs from the same number as a setting where `share` is set."""


@dataclass(frozen=True, kw_only=True)
class MadConfig:
    """Merge-Attend-Diffuse: views are merged into one canvas inside the attention layers."""

    steps: int | None = DefaultSteps(15)
    """Number of steps, from the first one on, in which attention is merged (the paper's tau), >= 0. 0 is plain
    MultiDiffusion, unless `cross_attention` is `always`. null: `share` sets it."""
    share: float | None = None
    """Instead of `steps`: the share of the denoising steps that run, 0..1, rounded to whole steps. Job files and
    overrides that set one of `steps` and `share` replace the other one of earlier files. null: `steps` sets it."""
    blocks: tuple[str, ...] = ("all",)
    """Layers in which attention is merged: `all`; for UNets `down`, `mid` and `up`; for transformers `early`, `middle`
    and `late` (thirds by depth), `double` and `single` (blocks with separate or shared weights for prompt and image);
    or patterns of layer names such as `up_blocks.1.*attn1*`. At least one."""
    cross_attention: str = "scheduled"
    """When cross-attention is merged: `scheduled`, in the first `steps` steps (the paper), or `always`, in all steps
    (the released code). Transformers have no separate cross-attention and take `scheduled` only."""
    positions: str = "canvas"
    """Positions of image tokens in steps in which a transformer's attention is merged: `canvas` (their place on the
    canvas), `fit` (the same, scaled into the range of a view) or `local` (the mean of their places in the views). Other
    steps use each view's own positions. Only for transformers."""

    requested_share: ClassVar[float | None] = None
    """`share` before it was converted to `steps`, for samplers that are called with other numbers of steps."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, DefaultSteps):
            object.__setattr__(self, "steps", int(self.steps) if self.share is None else None)
        both = f"method.mad.steps={as_yaml(self.steps)} and method.mad.share={as_yaml(self.share)}"
        check(
            (self.steps is None) != (self.share is None),
            f"{both}: set one of them, and the other to null",
        )
        check(
            self.steps is None or self.steps >= 0,
            f"method.mad.steps must be >= 0, got {self.steps}; 0 gives plain MultiDiffusion",
        )
        check(
            self.share is None or 0 <= self.share <= 1,
            f"method.mad.share must be in 0..1 of the steps, got {self.share}; 1 merges attention in all steps",
        )
        check_one_of("method.mad.cross_attention", self.cross_attention, ("scheduled", "always"))
        check_one_of("method.mad.positions", self.positions, ("canvas", "fit", "local"))
        check(len(self.blocks) > 0, "method.mad.blocks is empty; set method.mad.steps=0 to disable MAD")

    @property
    def as_requested(self) -> MadConfig:
        """The settings before `share` was converted to `steps`."""
        share = self.requested_share
        return self if share is None else replace(self, steps=None, share=share)

    @property
    def merged_steps(self) -> int:
        """Number of steps in which attention is merged; in a Job, `share` is already converted to `steps`."""
        assert self.steps is not None, "share needs the number of steps: see MethodConfig.with_steps"
        return self.steps


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How the views' noise predictions are merged, in the steps in which attention is not merged."""

    operator: str = "average"
    """`average`: the mean of the views, with `weights` (MultiDiffusion, Guided Fusion). `swap`: each column of an
    overlap is taken from one view, in turn, which keeps the high frequencies that averaging removes (SaFa)."""
    weights: str = "uniform"
    """Weights of `average` within a view: `uniform`, `radial` (linear, 1 in the middle, 0 in the corner; Guided Fusion)
    or `gaussian` (Mixture of Diffusers)."""
    width: int = 1
    """Width of the stripes of `swap` in latent cells, > 0."""
    reference_steps: int = 0
    """Number of steps, from the first one on, in which `swap` takes every other row in the middle of a view, where no
    other view lies, from a reference view, >= 0 (SaFa). Needs `layout: overlapping`, no MAD, no regions, and a
    scheduler whose steps do not depend on earlier ones, such as DDIM."""

    def __post_init__(self) -> None:
        check_one_of("method.merge.operator", self.operator, ("average", "swap"))
        check_one_of("method.merge.weights", self.weights, ("uniform", "radial", "gaussian"))
        check(self.width > 0, f"method.merge.width must be > 0 latent cells, got {self.width}")
        check(self.reference_steps >= 0, f"method.merge.reference_steps must be >= 0, got {self.reference_steps}")
        swaps = self.operator == "swap"
        check(
            self.weights == "uniform" or not swaps,
            f"method.merge.weights={self.weights} has no effect with operator=swap; set it to uniform",
        )
        check(
            self.width == 1 or swaps,
            f"method.merge.width={self.width} has no effect with operator=average; set it to 1, or operator=swap",
        )
        check(
            self.reference_steps == 0 or swaps,
            f"method.merge.reference_steps={self.reference_steps} needs operator=swap; set operator=swap, or it to 0",
        )

    @property
    def is_mean(self) -> bool:
        """Return whether predictions are merged by their plain mean."""
        return self.operator == "average" and self.weights == "uniform"

    @property
    def summary(self) -> str:
        """Return the settings that differ from the defaults, as on the command line."""
        return ", ".join(f"method.merge.{name}={value}" for name, value in changed(self).items())

    def check_steps(self, mad_steps: int, steps: int, sampling: SamplingParams) -> None:
        """Raise UserError if the merge has no effect in `steps` denoising steps, or cannot start from pictures."""
        described = sampling.described(steps)
        check(
            self.is_mean or mad_steps < steps,
            f"{self.summary} has no effect: attention is merged in all of {described} steps; lower "
            f"method.mad.steps={mad_steps}, or set it to 0 to disable MAD",
        )
        check(
            self.reference_steps <= steps,
            f"method.merge.reference_steps must be <= {described}, got {self.reference_steps}",
        )
        check(
            not self.reference_steps or sampling.init.strength is None,
            f"method.merge.reference_steps={self.reference_steps} denoises a view that starts from noise, so it cannot "
            "be combined with sampling.init; set it to 0",
        )


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """Variations of a panorama: spherical interpolation of the initial noise towards that of a second seed."""

    seed: int | None = None
    """The second seed, 0..2^64-1. null is the seed of the prompt's first sample, of which the prompt's other samples
    become variations. Noise that a scheduler draws in its steps is not blended."""
    share: Any = 0.0
    """Share of the second seed's noise, 0..1: 0 is the sample's noise, 1 the second seed's. A list has one share for
    each of `prompts.samples_per_prompt` samples, such as `[1, 0.95, 0.9, 0.8]`."""

    def __post_init__(self) -> None:
        name, shares = "method.noise.blend.share", self.share if isinstance(self.share, list | tuple) else [self.share]
        for share in shares:
            valid = type(share) in (int, float) and 0 <= share <= 1
            check(valid, f"{name} must be in 0..1, or a list of such numbers, got {quoted(share)}; 0 disables it")
        check(len(shares) > 0, f"{name} is an empty list; give one share for each sample, or 0")
        floats = [float(share) for share in shares]
        object.__setattr__(self, "share", floats if isinstance(self.share, list | tuple) else floats[0])
        check(
            self.seed is None or 0 <= self.seed < 2**64,
            f"method.noise.blend.seed must be in 0..2^64-1 or null, got {self.seed}",
        )

    @property
    def is_on(self) -> bool:
        """Return whether the noise of any sample is blended."""
        return any(self.share) if isinstance(self.share, list) else self.share > 0

    def check_count(self, samples: int, name: str) -> None:
        """Raise UserError if a list of shares has not one item for each of the samples, whose number is `name`."""
        check(
            not isinstance(self.share, list) or len(self.share) == samples,
            f"method.noise.blend.share={self.share} must have one item for each of {name}={samples}",
        )

    def of_sample(self, index: int, first_seed: int) -> NoiseBlend | None:
        """Return the blend of a prompt's sample; `first_seed` is that of its first sample. None: blending is off."""
        if not self.is_on:
            return None
        share = self.share[index] if isinstance(self.share, list) else self.share
        return NoiseBlend(first_seed if self.seed is None else self.seed, share)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The initial noise."""

    align: float = 0.0
    """Spherical interpolation of the initial noise towards the noise of one view, tiled: 0 is independent noise, 1 the
    same noise in every tile (style alignment, Guided Fusion), 0..1."""
    blend: BlendConfig = field(default_factory=BlendConfig)

    def __post_init__(self) -> None:
        check(0 <= self.align <= 1, f"method.noise.align must be in 0..1, got {self.align}; 0 disables it")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """SyncDiffusion: gradient steps that reduce the LPIPS distance between each view and the middle view."""

    weight: float = 0.0
    """Weight of the gradient, >= 0; step i uses `weight * decay ** i`. 0 disables SyncDiffusion; the paper uses 20."""
    decay: float = 0.95
    """Factor of the weight from step to step, 0 < decay <= 1; 1 keeps it constant."""
    steps: int = 50
    """Number of steps, from the first one on, in which gradients are applied, >= 0."""
    every: int = 1
    """Apply gradients only in each `every`-th of these steps, >= 1."""
    network: str = "vgg"
    """Features for LPIPS: `vgg` (VGG16 trained on ImageNet) or `random` (VGG16 without training, needs no download)."""

    def __post_init__(self) -> None:
        check(
            0 <= self.weight < float("inf"),
            f"method.sync.weight must be a finite number >= 0, got {self.weight}; 0 disables it",
        )
        check(0 < self.decay <= 1, f"method.sync.decay must be > 0 and <= 1, got {self.decay}; 1 means no decay")
        check(self.steps >= 0, f"method.sync.steps must be >= 0, got {self.steps}")
        check(
            self.steps > 0 or self.weight == 0,
            f"method.sync.steps=0 leaves method.sync.weight={self.weight:g} without effect; set the weight to 0",
        )
        check(self.every >= 1, f"method.sync.every must be >= 1 step, got {self.every}; 1 means every step")
        check_one_of("method.sync.network", self.network, ("vgg", "random"))

    def at(self, step: int) -> float:
        """Return the gradient weight at a step, 0 for no update."""
        due = step < self.steps and (step + 1) % self.every == 0
        return self.weight * self.decay**step if due else 0.0


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """Sampling of prompts with regions."""

    bootstrapping: int | None = None
    """Number of steps, from the first one on, in which a region is denoised over a plain colour outside its mask, so
    that its content stays inside, >= 0. 0 disables it; null is two fifths of the steps, as in the released code."""

    def __post_init__(self) -> None:
        check(
            self.bootstrapping is None or self.bootstrapping >= 0,
            f"method.regions.bootstrapping must be >= 0 steps or null, got {self.bootstrapping}",
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The joint diffusion method. MultiDiffusion, MAD, SyncDiffusion and SpotDiffusion are points in this space."""

    views: ViewsConfig = field(default_factory=ViewsConfig)
    mad: MadConfig = field(default_factory=MadConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        layout, merge = self.views.layout, self.merge
        check(
            merge.is_mean or layout != "whole",
            f"{merge.summary} has no effect with layout=whole, which has a single view; remove it",
        )
        reference = f"method.merge.reference_steps={merge.reference_steps}"
        check(
            not merge.reference_steps or layout == "overlapping",
            f"{reference} needs views that stay in place, got method.views.layout={layout}; use overlapping",
        )
        check(
            not merge.reference_steps or not (self.mad.steps or self.mad.share or self.mad.cross_attention == "always"),
            f"{reference} acts in the first steps, in which method.mad merges attention; set method.mad.steps=0 and "
            "method.mad.cross_attention=scheduled",
        )
        check(
            not (self.sync.weight and self.views.layout == "whole"),
            "method.sync compares views, but layout=whole has only one; set method.sync.weight to 0",
        )

    def with_steps(self, num_inference_steps: int) -> MethodConfig:
        """Return the method with `mad.share` converted to `mad.steps`, also if it was for another number of steps."""
        share = self.mad.requested_share if self.mad.share is None else self.mad.share
        if share is None:
            return self
        mad = replace(self.mad, steps=share_of_steps(share, num_inference_steps), share=None)
        object.__setattr__(mad, "requested_share", share)  # no field: jobs record `steps` alone
        return replace(self, mad=mad)

    @property
    def operators(self) -> str:
        """Return the settings of `merge` and `noise` that differ from the defaults, as on the command line."""
        align = [f"method.noise.align={self.noise.align}"] if self.noise.align else []
        blend = [f"method.noise.blend.share={self.noise.blend.share}"] if self.noise.blend.is_on else []
        return ", ".join([*filter(None, [self.merge.summary]), *align, *blend])
