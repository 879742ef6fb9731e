"""What the coherence study compares: prompts, and settings of the sampler. Sizes are pixels, strides latent cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from madgen import PanoramaSampler
from madgen.geometry import Geometry
from madgen.joint.views import Layout, build_layout

# Every prompt leaves something open, so independent views may disagree; what it names is what `caption` checks.
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
"""The paper counts τ in 50 steps."""


SYNC = (("sync_weight", 20.0), ("sync_steps", 10), ("sync_network", "random"))


@dataclass(frozen=True)
class Setting:
    """One point of the study. Shares are of the number of steps, so that they mean the same at any number."""

    group: str
    name: str
    tau: float = 0.0
    """Share of the steps in which attention merges."""
    layout: str = "overlapping"
    stride: int | None = None
    blocks: tuple[str, ...] = ("down", "mid", "up")
    cross_attention: str = "scheduled"
    overlap_first: float = 0.0
    """Share of the steps, the first ones, with overlapping views in a shifted layout."""
    overlap_last: float = 0.0
    """Share of the steps, the last ones, with overlapping views in a shifted layout."""
    height: int = 128
    width: int = 512
    loop: bool = False
    share: float = 1.0
    """Of the study's panoramas: costly and side settings take fewer."""
    extra: tuple[tuple[str, Any], ...] = ()
    """Further keywords of `PanoramaSampler.from_pretrained`, and their values."""

    def pixels(self, steps: int) -> dict[str, Any]:
        """What the pictures depend on: neither how the setting is called nor how often it is sampled."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("group", "name", "share", "tau")}
        return {**fields, "merged_steps": self.merged_steps(steps)}

    def merged_steps(self, steps: int) -> int:
        """τ, in steps of the study."""
        return round(self.tau * steps)


def tau(of_50: int) -> float:
    """The paper's τ as a share of the steps."""
    return of_50 / PAPER_STEPS


def settings() -> list[Setting]:
    """Every setting, in the order of the report."""
    shifted = partial(Setting, layout="shifted")
    seams, loop = partial(shifted, "seams"), partial(Setting, "loop", share=0.5)
    half, quarter, eighth = ({"share": 1 / n} for n in (2, 4, 8))
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
        Setting("methods", "SyncDiffusion, untrained VGG16, 10 of 20 steps", extra=SYNC, share=1 / 8),
        seams("shifts of 4 cells", 1.0),
        seams("shifts of 8 cells", 1.0, stride=8, **half),
        seams("last step overlapping", 1.0, overlap_last=0.05, **half),
        seams("last 2 of 20 overlapping", 1.0, overlap_last=0.1, **half),
        seams("last 4 of 20 overlapping", 1.0, overlap_last=0.2, **half),
        seams("last 2 of 20 without MAD", 0.9, **half),
        seams("last 4 of 20 without MAD", 0.8, **half),
        Setting("seams", "overlapping views, MAD in every step", 1.0),
        *_sizes("widths", ((256, 128, half), (512, 128, {}), (768, 128, quarter), (1536, 128, eighth))),
        *_sizes("vertical", ((128, 768, quarter),)),
        loop("overlapping, open", 1.0, stride=8),
        loop("overlapping, loop", 1.0, stride=8, loop=True),
        loop("shifted, open", 1.0, layout="shifted"),
        loop("shifted, loop", 1.0, layout="shifted", loop=True),
    ]


def _sizes(group: str, sizes: tuple[tuple[int, int, dict[str, float]], ...]) -> Iterator[Setting]:
    for width, height, share in sizes:
        where = {"width": width, "height": height, **share}
        yield Setting(group, f"{height}x{width}, MultiDiffusion", **where)
        yield Setting(group, f"{height}x{width}, MAD in every step", 1.0, **where)


class StudyGeometry(Geometry):
    """Views that change their kind on the way, as `Setting` asks; the sampler takes any `Layout`."""

    def __init__(self, plain: Geometry, setting: Setting, steps: int):
        self.__dict__.update(plain.__dict__)
        self.setting, self.steps = setting, steps

    def build(self, height: int, width: int, loop: bool = False) -> Layout:
        base = super().build(height, width, loop)
        first, last = (round(getattr(self.setting, name) * self.steps) for name in ("overlap_first", "overlap_last"))
        if not (first or last):
            return base
        cells = (height // self.spec.factor, width // self.spec.factor, self.view_size)
        overlapping = build_layout("overlapping", *cells, self.setting.stride or self.view_size // 4, loop)

        def at(step: int):
            return overlapping.at(step) if step < first or step >= self.steps - last else base.at(step)

        return Layout(at)


def new_sampler(setting: Setting, pretrained: str, steps: int) -> PanoramaSampler:
    """The sampler of a setting for `steps` steps."""
    sampler = PanoramaSampler.from_pretrained(
        pretrained,
        layout=setting.layout,
        stride=setting.stride,
        mad_steps=setting.merged_steps(steps),
        mad_blocks=setting.blocks,
        cross_attention=setting.cross_attention,
        dtype="float32",
        **dict(setting.extra),
    )
    sampler.geometry = StudyGeometry(sampler.geometry, setting, steps)
    return sampler


def view_evaluations(sampler: PanoramaSampler, setting: Setting, steps: int) -> float:
    """UNet passes over a view that one panorama takes, classifier-free guidance's second pass not counted.

    One view that is the whole canvas counts by its area.
    """
    layout = sampler.geometry.build(setting.height, setting.width, setting.loop)
    views = [layout.at(step) for step in range(steps)]
    area = sampler.backbone.spec.view_size**2
    return sum(view.count * view.rows.size * view.columns.size / area for view in views)
