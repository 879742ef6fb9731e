"""What a plan will cost: view evaluations (one UNet pass over one view of one panorama) and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from madgen.joint.schedule import SyncSchedule
from madgen.joint.views import Layout
from madgen.plan.shards import Plan
from madgen.types import Prompt

# Bytes a pixel of the 24 panoramas of jobs/demo.yaml at quality 95. They are soft: photographs take several times more.
BYTES_PER_PIXEL = {"png": 0.75, "jpg": 0.22, "webp": 0.1}


@dataclass(frozen=True)
class Cost:
    """Totals over the whole plan."""

    view_evaluations: int
    megapixels: float
    bytes: int


def has_regions(plan: Plan) -> bool:
    """Whether any prompt has parts with prompts of their own."""
    totals = plan.prompts.header.totals
    return totals.texts != totals.sizes


def sizes(plan: Plan) -> Counter[tuple[int, int]]:
    """How many panoramas there are of each (height, width) in pixels."""
    return _times_samples(plan, plan.prompts.header.totals.sizes)


def _rows(plan: Plan) -> Counter[tuple[int, int]]:
    """As `sizes`, each panorama counted once for its own prompt and once for each of its regions."""
    return _times_samples(plan, plan.prompts.header.totals.texts)


def _times_samples(plan: Plan, counts: Counter[tuple[int, int]]) -> Counter[tuple[int, int]]:
    return Counter({size: count * plan.samples_per_prompt for size, count in counts.items()})


def view_evaluations(layout: Layout, passes: Iterable[tuple[int, int]], sync: SyncSchedule) -> int:
    """UNet view evaluations of one prompt on one panorama; `passes`: the step and the UNet passes of each evaluation.

    Schedulers of second order have two evaluations a step; guidance takes two passes.
    SyncDiffusion's gradient counts as 3 of them for each view but the anchor, which takes one.
    """
    total = 0
    for step, each in passes:
        views = layout.at(step).count
        total += each * (views + (3 * (views - 1) + 1 if sync.at(step) and views > 1 else 0))
    return total


def prompt_evaluations(evaluations: dict[tuple[int, int], int], prompt: Prompt) -> int:
    """UNet view evaluations of one panorama of a prompt, each of its regions being a prompt too."""
    return evaluations[prompt.height, prompt.width] * (1 + len(prompt.regions))


def total_cost(plan: Plan, evaluations: dict[tuple[int, int], int], image_format: str) -> Cost:
    """Sums over sizes; `evaluations` holds the view evaluations of one prompt on one panorama of each size."""
    pixels = sum(height * width * count for (height, width), count in sizes(plan).items())
    return Cost(
        view_evaluations=sum(evaluations[size] * count for size, count in _rows(plan).items()),
        megapixels=pixels / 1e6,
        bytes=int(pixels * BYTES_PER_PIXEL[image_format]),
    )
