"""The shapes of a run: its backbone's, its views' and its denoising steps, from config files. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from madgen.backbones import BackboneSpec, backbone_module
from madgen.backbones._family import ALL
from madgen.diffusion.views import Layout
from madgen.hub.repository import without_retries
from madgen.hub.safetensors_file import read_header
from madgen.hub.weights import single_file
from madgen.planning.cost import Evaluations, sizes, view_evaluations
from madgen.planning.resolved_run import ResolvedRun
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method
from madgen.utils.errors import UserError


class Shapes:
    """Views and denoising steps of a run. Raises UserError for the first size, stride or setting that cannot work.

    `assume_spec`: if the backbone's config files are not available, take the shapes that its family shares.
    """

    def __init__(self, run: ResolvedRun, assume_spec: bool = False):
        self.run, self.method = run, Method(run.job.method)
        self.spec, self.is_assumed = _spec(run, assume_spec)

    @cached_property
    def own_scheduler(self) -> dict[str, Any] | None:
        """Config of the checkpoint's own scheduler; None if it is not on this machine."""
        if self.is_assumed:
            return None
        backbone = self.run.job.backbone
        with without_retries():
            return backbone_module(backbone.name).own_scheduler(self.run.files, backbone.prediction_type)

    @cached_property
    def steps(self) -> list[int]:
        """The step of each evaluation of the denoiser, from the first one that runs; see `FromPictures.first`."""
        sampling, left = self.run.job.sampling, self.run.job.denoising_steps
        steps = backbone_module(self.run.job.backbone.name).evaluated_steps(self.own_scheduler, sampling)
        skipped = sampling.num_inference_steps - left
        if not skipped:
            return steps
        order = steps.count(0)  # schedulers of second order take two evaluations a step
        numbers: dict[int, int] = {}
        return [numbers.setdefault(step, len(numbers)) for step in steps[skipped * order :]] if left else []

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes that the views can cover."""
        return Geometry(self.spec, self.method)

    @cached_property
    def layouts(self) -> dict[tuple[int, int], Layout]:
        """The views of panoramas of each (height, width) in pixels."""
        layouts = {}
        for size in sizes(self.run.plan):
            try:
                layouts[size] = self.geometry.build(*size, self.run.job.sampling.loop)
            except UserError as error:
                raise UserError(f"{_row_of_size(self.run, size)}{error}") from error
        return layouts

    @cached_property
    def views(self) -> dict[tuple[int, int], int]:
        """Views per panorama of each size, in the first step."""
        return {size: layout.at(0).count for size, layout in self.layouts.items()}

    @property
    def has_single_views(self) -> bool:
        """Return whether each panorama is a single view."""
        return all(count == 1 for count in self.views.values())

    @property
    def canvas_steps(self) -> int:
        """Number of first steps in which a transformer runs the canvas as one view."""
        merging = self.method.merging
        equals_canvas = self.spec.joint_attention and merging.positions == "canvas" and ALL in merging.blocks
        return merging.steps if equals_canvas and self.method.sync is None else 0

    @cached_property
    def evaluations(self) -> dict[tuple[int, int], Evaluations]:
        """View evaluations per panorama of each size."""
        return self.evaluations_in(self.steps)

    def evaluations_in(self, steps: Iterable[int]) -> dict[tuple[int, int], Evaluations]:
        """Count the view evaluations per panorama of each size; `steps`: the step of each evaluation."""
        job, sampling = self.run.job, self.run.job.sampling
        always, twice = sampling.guidance_steps is None, self.spec.is_guided(sampling.guidance_scale)
        passes = [(step, twice and (always or step in sampling.guided_steps)) for step in steps]
        bootstrapped = self.method.bootstrapped_steps(job.denoising_steps)
        reference, view_size = job.method.merge.reference_steps, self.geometry.view_size
        return {
            size: view_evaluations(
                layout, passes, self.method.sync, bootstrapped, reference, self.canvas_steps, view_size
            )
            for size, layout in self.layouts.items()
        }


def _spec(run: ResolvedRun, assume: bool) -> tuple[BackboneSpec, bool]:
    """Return the backbone's shapes, and True if they are only those of its family."""
    module = backbone_module(run.job.backbone.name)
    try:
        with without_retries() if assume else nullcontext():
            return module.describe(run.files), False
    except UserError:
        pretrained = run.job.backbone.pretrained
        if not assume or Path(run.files.pretrained).is_dir():  # its files are here: damaged, or of another family
            raise
        if (file := single_file(pretrained)) is not None:
            read_header(file, f"backbone.pretrained={pretrained}")
        return module.family_spec(pretrained), True


def _row_of_size(run: ResolvedRun, size: tuple[int, int]) -> str:
    """Return the location of the first row of a size, for messages; empty if it is the job's size."""
    if size == (run.job.sampling.height, run.job.sampling.width):
        return ""
    prompts = run.plan.prompts
    row = next(row for row, prompt in enumerate(prompts) if (prompt.height, prompt.width) == size)
    return f"{prompts.location(row)}: "
