"""Prompts and sampler settings of the coherence study. Sizes are in pixels, strides in latent cells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from madgen import PanoramaSampler
from madgen.config.schema import (
    BackboneConfig,
    MadConfig,
    MergeConfig,
    MethodConfig,
    NoiseConfig,
    SamplingParams,
    SyncConfig,
    ViewsConfig,
)
from madgen.diffusion.views import Layout, build_layout
from madgen.hub.weights import resolve_pretrained
from madgen.sampling.geometry import Geometry

# No prompt determines the whole scene, so that independent views may disagree. The values are checked by `caption`.
PROMPTS: dict[str, dict[str, str]] = {
    "mountains": {},
    "the sea": {"ground": "sea"},
    "mountains at sunset": {"time": "sunset"},
    "a landscape panorama": {},
    "a meadow with trees": {"ground": "meadow"},
    "a landscape at night": {"time": "night"},
    "hills": {},
    "mountains over a desert": {"ground": "desert"},
    "a forest at dawn": {"time": "dawn"},
    "dunes": {},
    "hills over the snow": {"ground": "snow"},
    "mountains, low horizon": {"horizon": "low"},
    "a forest": {},
    "hills over a lavender": {"ground": "lavender"},
    "hills at noon": {"time": "noon"},
    "a city skyline": {},
}
GUIDANCE = 3.0
PAPER_STEPS = 50
"""Number of steps that the paper's τ refers to."""
PAPER_SIGMA_SHARE = 0.25
"""Share of linear flow-matching steps after which sigma is about that of the paper's 15 of 50 steps, 0.77."""


SYNC = (("sync_weight", 20.0), ("sync_steps", 10), ("sync_network", "random"))


@dataclass(frozen=True)
class Setting:
    """A setting of the study. Its name and fields are part of the cache keys; shares are fractions of the steps."""

    group: str
    name: str
    tau: float = 0.0
    """Share of the steps with merged attention."""
    layout: str = "overlapping"
    stride: int | None = None
    blocks: tuple[str, ...] = ("down", "mid", "up")
    cross_attention: str = "scheduled"
    overlap_first: float = 0.0
    """Share of the first steps with overlapping views in a shifted layout."""
    overlap_last: float = 0.0
    """Share of the last steps with overlapping views in a shifted layout."""
    steps: float = 1.0
    """Fraction of the study's number of steps."""
    scheduler: str | None = None
    guided: tuple[float, float] | None = None
    """Shares of the steps between which guidance is applied."""
    height: int = 128
    width: int = 512
    loop: bool = False
    share: float = 1.0
    """Fraction of the study's panoramas, for costly settings."""
    extra: tuple[tuple[str, Any], ...] = ()
    """Settings of SyncDiffusion, with the prefix `sync_`."""
    merge: tuple[tuple[str, Any], ...] = ()
    """Settings of `method.merge`."""
    align: float = 0.0
    """`method.noise.align`."""
    sharpness: bool = False
    """Score the sharpness too, which earlier studies did not."""
    positions: str = ""
    """`method.mad.positions` of a transformer."""

    def pixels(self, steps: int) -> dict[str, Any]:
        """Return everything that the scores depend on, without the name and the number of samples."""
        names, later = ("group", "name", "share", "tau"), ("merge", "align", "sharpness", "positions")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in names and (v or k not in later)}
        return {**fields, "merged_steps": self.merged_steps(steps)}

    def own_steps(self, steps: int) -> int:
        """Return the number of steps in a study of `steps`."""
        return round(self.steps * steps)

    def merged_steps(self, steps: int) -> int:
        """Return τ in steps of the setting."""
        return round(self.tau * self.own_steps(steps))

    def guidance_steps(self, steps: int) -> tuple[int, int] | None:
        """Return the first step with guidance and the first one after it."""
        own = self.own_steps(steps)
        return None if self.guided is None else (round(self.guided[0] * own), round(self.guided[1] * own))


def tau(of_50: int) -> float:
    """Convert the paper's τ to a share of the steps."""
    return of_50 / PAPER_STEPS


def settings(pretrained: str = "demo") -> list[Setting]:
    """Return all settings of a backbone in the order of the report."""
    if family(pretrained) == "flux":
        return list(_transformer())
    shifted = partial(Setting, layout="shifted")
    seams, loop = partial(shifted, "seams"), partial(Setting, "loop")
    return [
        *(Setting("tau", f"MAD, τ={of_50} of 50", tau(of_50)) for of_50 in (0, 5, 15, 25, 50)),
        Setting("blocks", "down", 1.0, blocks=("down",), stride=8),
        Setting("blocks", "mid", 1.0, blocks=("mid",), stride=8),
        Setting("blocks", "up", 1.0, blocks=("up",), stride=8),
        Setting("blocks", "down + mid", 1.0, blocks=("down", "mid"), stride=8),
        Setting("blocks", "mid + up", 1.0, blocks=("mid", "up"), stride=8),
        Setting("blocks", "down + up", 1.0, blocks=("down", "up"), stride=8),
        Setting("blocks", "down + mid + up", 1.0, stride=8),
        Setting("methods", "direct", layout="whole"),
        Setting("methods", "MultiDiffusion"),
        Setting("methods", "MAD, τ=15 of 50", tau(15)),
        Setting("methods", "MAD, τ=15 of 50, cross-attention always", tau(15), cross_attention="always"),
        Setting("methods", "MAD, every step", 1.0),
        shifted("methods", "shifted, no MAD (SpotDiffusion)"),
        shifted("methods", "shifted, MAD τ=15 of 50", tau(15)),
        shifted("methods", "MAD τ=15 of 50 overlapping, then shifted", tau(15), overlap_first=tau(15)),
        shifted("methods", "shifted, MAD in every step", 1.0),
        shifted("methods", "shifted, MAD in all but the last 4 of 20 steps", 0.8),
        Setting("methods", "SyncDiffusion, untrained VGG16, 10 of 20 steps", extra=SYNC),
        seams("shifts of 4 cells", 1.0),
        seams("shifts of 8 cells", 1.0, stride=8),
        seams("last step overlapping", 1.0, overlap_last=0.05),
        seams("last 2 of 20 overlapping", 1.0, overlap_last=0.1),
        seams("last 4 of 20 overlapping", 1.0, overlap_last=0.2),
        seams("last 2 of 20 without MAD", 0.9),
        seams("last 4 of 20 without MAD", 0.8),
        seams("last 4 of 20 without MAD, the last one overlapping", 0.8, overlap_last=0.05),
        seams("last 4 of 20 without MAD, the last 2 overlapping", 0.8, overlap_last=0.1),
        seams("last 2 of 20 without MAD and overlapping", 0.9, overlap_last=0.1),
        Setting("seams", "overlapping views, MAD in every step", 1.0),
        *_sizes("widths", ((256, 128), (512, 128), (768, 128), (1536, 128))),
        *_sizes("vertical", ((128, 512), (128, 768))),
        loop("overlapping, open", 1.0, stride=8),
        loop("overlapping, loop", 1.0, stride=8, loop=True),
        loop("shifted, open", 1.0, layout="shifted"),
        loop("shifted, loop", 1.0, layout="shifted", loop=True),
        *_cheaper(),
        *_operators(),
    ]


def family(pretrained: str) -> str:
    """Return `backbone.name` of a demo backbone, or of a folder with weights of one."""
    index = json.loads((Path(resolve_pretrained(pretrained)) / "model_index.json").read_text(encoding="utf-8"))
    return "flux" if index["_class_name"] == "FluxPipeline" else "sd"


def _transformer() -> Iterator[Setting]:
    """Yield settings of a transformer: merged steps, layers, positions and layouts."""
    merged = partial(Setting, blocks=("all",), sharpness=True)
    yield merged("methods", "direct", layout="whole")
    yield merged("methods", "MultiDiffusion")
    for share in (0.1, PAPER_SIGMA_SHARE, 0.5, 0.8, 1.0):
        yield merged("methods", f"MAD in the first {share:.0%} of the steps", share)
    yield merged("methods", "shifted, no MAD", layout="shifted")
    yield merged("methods", "shifted, MAD in the first 80% of the steps", 0.8, layout="shifted")
    yield merged("methods", "shifted, MAD in every step", 1.0, layout="shifted")
    for blocks in (("early",), ("middle",), ("late",), ("double",), ("single",), ("early", "middle"), ("all",)):
        yield merged("blocks", " + ".join(blocks), 1.0, blocks=blocks, stride=8)
    for positions in ("canvas", "fit", "local"):
        yield merged("positions", positions, 1.0, positions=positions, stride=8)
    for width in (256, 1024):
        yield merged("widths", f"128x{width}, MultiDiffusion", width=width)
        yield merged("widths", f"128x{width}, MAD in every step", 1.0, width=width)
        yield merged("widths", f"128x{width}, direct", layout="whole", width=width)


def _cheaper() -> Iterator[Setting]:
    """Yield settings with fewer UNet passes: larger strides, shifted views, fewer steps, guidance in some steps."""
    cost, middle = partial(Setting, "cost"), (0.1, 0.8)
    fast = partial(cost, layout="shifted")
    yield cost("MAD τ=15 of 50, stride view/4", tau(15))
    yield cost("MAD in every step, stride view/4", 1.0)
    yield cost("MAD in every step, stride view/2", 1.0, stride=8)
    yield cost("MAD in every step, stride view", 1.0, stride=16)
    yield cost("MAD in every step, guided in the middle", 1.0, guided=middle)
    yield fast("shifted, MAD τ=45", 0.9)
    yield fast("shifted, MAD τ=45, guided in the middle", 0.9, guided=middle)
    for scheduler in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        half = {"steps": 0.5, "scheduler": scheduler}
        name = f"{scheduler.removesuffix('MultistepScheduler').removesuffix('Scheduler')}, half the steps"
        yield cost(f"MAD in every step, {name}", 1.0, **half)
        yield fast(f"shifted, MAD τ=40, {name}", 0.8, **half)
    yield fast(f"shifted, MAD τ=40, {name}, guided in the middle", 0.8, guided=middle, **half)


def _operators() -> Iterator[Setting]:
    """Yield merge operators and aligned noise, the promising combinations first."""
    operators, wide = partial(Setting, "operators", sharpness=True), {"stride": 12}
    radial, gaussian = {"merge": (("weights", "radial"),)}, {"merge": (("weights", "gaussian"),)}
    swap = {"merge": (("operator", "swap"),)}
    unipc = {"steps": 0.5, "scheduler": "UniPCMultistepScheduler"}
    yield operators("mean, stride 3/4", **wide)
    yield operators("swap, stride 3/4", **wide, **swap)
    yield operators("radial weights, stride 3/4", **wide, **radial)
    yield operators("MAD τ=40, then mean, stride 3/4", 0.8, **wide)
    yield operators("MAD τ=40, then swap, stride 3/4", 0.8, **wide, **swap)
    yield operators("shifted, MAD τ=40, UniPC in half the steps (fast.yaml)", 0.8, layout="shifted", **unipc)
    yield operators("MAD τ=40, then swap, stride 3/4, UniPC in half the steps", 0.8, **wide, **swap, **unipc)
    yield operators("MAD τ=40, then mean, stride 3/4, UniPC in half the steps", 0.8, **wide, **unipc)
    yield operators(
        "shifted, MAD τ=40, UniPC in half the steps, noise aligned 0.1", 0.8, layout="shifted", align=0.1, **unipc
    )
    for steps in (6, 12):
        reference = {"merge": (*swap["merge"], ("reference_steps", steps))}
        yield operators(f"swap, stride 3/4, reference in {steps} of 20 steps", **wide, **reference)
    for share in (0.1, 0.5):
        yield operators(f"mean, stride 3/4, noise aligned {share:g}", **wide, align=share)
    yield operators("MultiDiffusion, stride 1/4")
    yield operators("swap, stride 1/4", **swap)
    yield operators("radial weights, stride 1/4", **radial)
    yield operators("plain tiles", stride=16)
    yield operators("gaussian weights, stride 3/4", **wide, **gaussian)
    yield operators("mean, stride 3/4, DDPM (variance-corrected)", **wide, scheduler="DDPMScheduler")
    yield operators("swap, stride 3/4, stripes of 2 cells", **wide, merge=(*swap["merge"], ("width", 2)))
    yield operators("MAD τ=40, then radial weights, stride 3/4", 0.8, **wide, **radial)
    yield operators("MAD τ=40, then gaussian weights, stride 3/4", 0.8, **wide, **gaussian)
    yield operators(
        "MAD τ=40, then gaussian weights, stride 3/4, UniPC in half the steps", 0.8, **wide, **gaussian, **unipc
    )
    yield operators("shifted, MAD τ=40 (mad-shifted.yaml)", 0.8, layout="shifted")
    yield operators("MAD in every step, stride 1/4", 1.0)


def _sizes(group: str, sizes: tuple[tuple[int, int], ...]) -> Iterator[Setting]:
    for width, height in sizes:
        where = {"width": width, "height": height}
        yield Setting(group, f"{height}x{width}, MultiDiffusion", **where)
        yield Setting(group, f"{height}x{width}, MAD in every step", 1.0, **where)


class StudyGeometry(Geometry):
    """Shifted views that overlap in the first steps of a setting."""

    def __init__(self, plain: Geometry, setting: Setting, steps: int):
        self.__dict__.update(plain.__dict__)
        self.first = round(setting.overlap_first * setting.own_steps(steps))

    def build(self, height: int, width: int, loop: bool = False) -> Layout:
        base = super().build(height, width, loop)
        if not self.first:
            return base
        cells = (height // self.spec.factor, width // self.spec.factor, self.view_size)
        overlapping = build_layout("overlapping", *cells, self.stride, loop)
        return Layout(lambda step: overlapping.at(step) if step < self.first else base.at(step))


def overlap_from(setting: Setting, steps: int) -> int | None:
    """Return the step from which shifted views overlap in a study of `steps`."""
    own = setting.own_steps(steps)
    last = round(setting.overlap_last * own)
    return own - last if last else None


def new_sampler(setting: Setting, pretrained: str, steps: int, device: str = "cpu") -> PanoramaSampler:
    """Return the sampler of a setting in a study of `steps`."""
    method = MethodConfig(
        views=ViewsConfig(layout=setting.layout, stride=setting.stride, overlap_from=overlap_from(setting, steps)),
        mad=MadConfig(
            steps=setting.merged_steps(steps),
            blocks=setting.blocks,
            cross_attention=setting.cross_attention,
            **({"positions": setting.positions} if setting.positions else {}),
        ),
        merge=MergeConfig(**dict(setting.merge)),
        noise=NoiseConfig(align=setting.align),
        sync=SyncConfig(**{name.removeprefix("sync_"): value for name, value in setting.extra}),
    )
    backbone = BackboneConfig(name=family(pretrained), pretrained=pretrained, dtype="float32")
    sampler = PanoramaSampler.from_configs(backbone, method, SamplingParams(scheduler=setting.scheduler), device)
    sampler.geometry = StudyGeometry(sampler.geometry, setting, steps)
    return sampler


def view_evaluations(sampler: PanoramaSampler, setting: Setting, steps: int) -> float:
    """Return a panorama's UNet passes over views, without the second pass of classifier-free guidance.

    A single view of the whole canvas counts by its area.
    """
    return sum(_views(sampler, setting, steps)) + sampler.method.config.merge.reference_steps


def unet_passes(sampler: PanoramaSampler, setting: Setting, steps: int) -> float:
    """Return a panorama's UNet passes over views, with the second pass of classifier-free guidance."""
    guided = range(*(setting.guidance_steps(steps) or (0, setting.own_steps(steps))))
    reference = sampler.method.config.merge.reference_steps
    views = (count + (step < reference) for step, count in enumerate(_views(sampler, setting, steps)))
    twice = sampler.backbone.spec.guidance == "cfg"
    return sum(count * (2 if twice and step in guided else 1) for step, count in enumerate(views))


def _views(sampler: PanoramaSampler, setting: Setting, steps: int) -> list[float]:
    """Return the number of views of each step; a transformer that merges in all layers runs the canvas once."""
    layout, spec = sampler.geometry.build(setting.height, setting.width, setting.loop), sampler.backbone.spec
    views = [layout.at(step) for step in range(setting.own_steps(steps))]
    counts = [view.count * view.rows.size * view.columns.size / spec.view_size**2 for view in views]
    if setting.blocks == ("all",) and setting.positions in ("", "canvas"):
        canvas = setting.height * setting.width / (spec.view_size * spec.factor) ** 2
        counts[: setting.merged_steps(steps)] = [canvas] * setting.merged_steps(steps)
    return counts
