"""Cost of a plan: view evaluations and disk space.

A view evaluation is one denoiser pass over one view of one panorama. A pass over the canvas as a single view, in direct
inference and where a transformer merges all layers, counts as the views that cover the canvas without overlap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from madgen.config.schema import SyncConfig
from madgen.dataset.plan import Plan
from madgen.diffusion.views import Layout, Views
from madgen.prompts.totals import paths
from madgen.types import Prompt

# Bytes per pixel of the 24 panoramas of jobs/demo.yaml at quality 95. Photographs take several times more.
BYTES_PER_PIXEL = {"png": 0.75, "jpg": 0.22, "webp": 0.1}


@dataclass(frozen=True)
class Cost:
    """Totals over the whole plan."""

    view_evaluations: int
    megapixels: float
    bytes: int
    pictures: int = 0
    """Pictures that are encoded to start from, as large as the panoramas."""


@dataclass(frozen=True)
class Evaluations:
    """View evaluations of a panorama of one size, per prompt and per negative prompt on it."""

    texts: int
    """Per prompt or region, including its negative prompt if that is never shared."""
    apart: int = 0
    """Per negative prompt, in the first steps, in which regions are bootstrapped."""
    negatives: int = 0
    """Per distinct negative prompt, in the other steps."""

    def total(self, texts: int, negatives: int, negatives_apart: int) -> int:
        """Return the sum for these counts of `madgen.prompts.totals.paths`."""
        return self.texts * texts + self.negatives * negatives + self.apart * negatives_apart


def sizes(plan: Plan) -> Counter[tuple[int, int]]:
    """Return the number of panoramas of each (height, width) in pixels."""
    totals = plan.prompts.header.totals.sizes
    return Counter({size: each.prompts * plan.samples_per_prompt for size, each in totals.items()})


def view_evaluations(
    layout: Layout,
    passes: Iterable[tuple[int, bool]],
    sync: SyncConfig | None = None,
    bootstrapped: int = 0,
    reference_steps: int = 0,
    canvas_steps: int = 0,
    view_size: int | None = None,
) -> Evaluations:
    """Count the view evaluations of a panorama of one size.

    `passes` holds the step of each evaluation and whether it is guided; schedulers of second order have two
    evaluations per step. SyncDiffusion's gradient counts as 3 evaluations of each view but the anchor, which takes
    one, and negative prompts are not shared then. Regions are bootstrapped before the step `bootstrapped`. In the first
    `reference_steps` a reference view is denoised too. The first `canvas_steps` run the canvas once (transformers whose
    layers all merge). `view_size`: latent cells of the side of a view of `layout: whole`; None: as in the layout.
    """
    texts = negatives = apart = 0
    for step, guided in passes:
        views = _views(layout.at(step), step < canvas_steps, view_size)
        views += 3 * (views - 1) + 1 if sync and sync.at(step) and views > 1 else 0
        views += 1 if step < reference_steps else 0
        texts += views + (views if guided and sync else 0)
        if guided and not sync:
            apart += views if step < bootstrapped else 0
            negatives += views if step >= bootstrapped else 0
    return Evaluations(texts, apart=apart, negatives=negatives)


def _views(views: Views, is_canvas: bool, size: int | None) -> int:
    """Return the number of views, or the area of the canvas in views, rounded up, if it runs as one."""
    rows, columns = views.rows, views.columns
    if not (is_canvas or (rows.is_whole and columns.is_whole)):
        return views.count
    area = rows.size * columns.size if size is None else size**2
    return math.ceil(rows.extent * columns.extent / area)


def prompt_evaluations(evaluations: Mapping[tuple[int, int], Evaluations], prompt: Prompt) -> int:
    """Count the view evaluations of one panorama of a prompt and its regions."""
    return evaluations[prompt.height, prompt.width].total(*paths(prompt.negative, prompt.regions))


def total_cost(plan: Plan, evaluations: Mapping[tuple[int, int], Evaluations], image_format: str) -> Cost:
    """Sum up the cost of a plan, given the evaluations of each size."""
    totals = plan.prompts.header.totals.sizes
    counts = {size: (each.texts, each.negatives, each.negatives_apart) for size, each in totals.items()}
    pixels = sum(height * width * count for (height, width), count in sizes(plan).items())
    return Cost(
        view_evaluations=plan.samples_per_prompt
        * sum(evaluations[size].total(*count) for size, count in counts.items()),
        megapixels=pixels / 1e6,
        bytes=int(pixels * BYTES_PER_PIXEL[image_format]),
    )
