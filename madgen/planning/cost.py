"""What a plan will cost: view evaluations (one UNet pass over one view of one panorama) and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from madgen.dataset.plan import Plan
from madgen.diffusion.sync_schedule import SyncSchedule
from madgen.diffusion.views import Layout
from madgen.prompts.totals import paths
from madgen.types import Prompt

# Bytes a pixel of the 24 panoramas of jobs/demo.yaml at quality 95. They are soft: photographs take several times more.
BYTES_PER_PIXEL = {"png": 0.75, "jpg": 0.22, "webp": 0.1}


@dataclass(frozen=True)
class Cost:
    """Totals over the whole plan."""

    view_evaluations: int
    megapixels: float
    bytes: int


@dataclass(frozen=True)
class Evaluations:
    """UNet view evaluations of panoramas of one size, a path each: of prompts and their negative prompts."""

    texts: int
    """Of each prompt or region; with its negative prompt where that is never shared."""
    apart: int = 0
    """Of each negative prompt, in the first steps, in which regions are bootstrapped."""
    negatives: int = 0
    """Of each negative prompt, in the other steps."""

    def of(self, texts: int, negatives: int, negatives_apart: int) -> int:
        """All of them, for so many; see `madgen.prompts.totals.paths`."""
        return self.texts * texts + self.negatives * negatives + self.apart * negatives_apart


def sizes(plan: Plan) -> Counter[tuple[int, int]]:
    """How many panoramas there are of each (height, width) in pixels."""
    return _times_samples(plan, plan.prompts.header.totals.sizes)


def _times_samples(plan: Plan, counts: Counter[tuple[int, int]]) -> Counter[tuple[int, int]]:
    return Counter({size: count * plan.samples_per_prompt for size, count in counts.items()})


def view_evaluations(
    layout: Layout, passes: Iterable[tuple[int, bool]], sync: SyncSchedule, bootstrapped: int = 0
) -> Evaluations:
    """Of panoramas of one size; `passes`: the step of each evaluation, and whether it is guided.

    Schedulers of second order have two evaluations a step. SyncDiffusion's gradient counts as 3 of them for each view
    but the anchor, which takes one, and it pulls each prompt's views its own way, so that none is shared. Before the
    step `bootstrapped` regions are bootstrapped.
    """
    texts = negatives = apart = 0
    for step, guided in passes:
        views = layout.at(step).count
        views += 3 * (views - 1) + 1 if sync.at(step) and views > 1 else 0
        texts += views + (views if guided and sync.weight else 0)
        if guided and not sync.weight:
            apart += views if step < bootstrapped else 0
            negatives += views if step >= bootstrapped else 0
    return Evaluations(texts, apart=apart, negatives=negatives)


def prompt_evaluations(evaluations: Mapping[tuple[int, int], Evaluations], prompt: Prompt) -> int:
    """UNet view evaluations of one panorama of a prompt, each of its regions being a prompt too."""
    return evaluations[prompt.height, prompt.width].of(*paths(prompt.negative, prompt.regions))


def total_cost(plan: Plan, evaluations: Mapping[tuple[int, int], Evaluations], image_format: str) -> Cost:
    """Sums over sizes; `evaluations` holds those of each."""
    totals = plan.prompts.header.totals
    counts = {size: (totals.texts[size], totals.negatives[size], totals.negatives_apart[size]) for size in totals.sizes}
    pixels = sum(height * width * count for (height, width), count in sizes(plan).items())
    return Cost(
        view_evaluations=plan.samples_per_prompt * sum(evaluations[size].of(*of) for size, of in counts.items()),
        megapixels=pixels / 1e6,
        bytes=int(pixels * BYTES_PER_PIXEL[image_format]),
    )
