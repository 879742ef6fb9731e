"""What a plan will cost: view evaluations (one UNet pass over one view of one panorama) and disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from madgen.joint.views import Layout
from madgen.plan.shards import Plan

# Bytes a pixel of the 24 panoramas of jobs/demo.yaml at quality 95. They are soft: photographs take several times more.
BYTES_PER_PIXEL = {"png": 0.75, "jpg": 0.22, "webp": 0.1}


@dataclass(frozen=True)
class Cost:
    """Totals over the whole plan."""

    view_evaluations: int
    megapixels: float
    bytes: int


def sizes(plan: Plan) -> Counter[tuple[int, int]]:
    """How many panoramas there are of each (height, width) in pixels."""
    return Counter({size: count * plan.samples_per_prompt for size, count in _prompt_sizes(plan).items()})


def _prompt_sizes(plan: Plan) -> Counter[tuple[int, int]]:
    return Counter((prompt.height, prompt.width) for prompt in plan.prompts)


def view_evaluations(layout: Layout, steps: int, passes: int) -> int:
    """UNet view evaluations of one panorama; `passes` is 2 with classifier-free guidance."""
    return passes * sum(layout.at(step).count for step in range(steps))


def total_cost(plan: Plan, evaluations: dict[tuple[int, int], int], image_format: str) -> Cost:
    """Sums over sizes; `evaluations` holds the view evaluations of one panorama of each size."""
    counts = sizes(plan)
    pixels = sum(height * width * count for (height, width), count in counts.items())
    return Cost(
        view_evaluations=sum(evaluations[size] * count for size, count in counts.items()),
        megapixels=pixels / 1e6,
        bytes=int(pixels * BYTES_PER_PIXEL[image_format]),
    )
