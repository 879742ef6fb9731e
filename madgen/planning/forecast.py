"""Check a plan against its backbone's shapes and sum up its cost. Loads no weights, writes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from madgen.backbones import BackboneSpec, backbone_module
from madgen.backbones._family import ALL
from madgen.backbones._loading import check_quantization
from madgen.dataset.encoding import check_side
from madgen.dataset.plan import has_regions
from madgen.diffusion.views import Layout
from madgen.hub.adapters import controlnet_id, ip_adapter_files
from madgen.hub.license import check_licences, licence_notes
from madgen.hub.lora_layers import check_lora
from madgen.hub.model_size import check_variant
from madgen.hub.repository import without_retries
from madgen.hub.safetensors_file import read_header
from madgen.hub.weights import single_file
from madgen.images.masks import cell_weights
from madgen.planning.cost import Cost, Evaluations, sizes, total_cost, view_evaluations
from madgen.planning.gpu_memory import GpuMemory, check_gpu_memory, gpu_memory
from madgen.planning.resolved_run import ResolvedRun
from madgen.planning.truncation import Truncation, count_truncated
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method
from madgen.sampling.scheduler_checks import check_regions_scheduler, check_start_scheduler
from madgen.utils.errors import UserError
from madgen.utils.filesystems import check_client_installed


@dataclass(frozen=True)
class Forecast:
    """Result of checking a plan."""

    spec: BackboneSpec
    spec_is_assumed: bool
    """True if the backbone's config files are not on this machine."""
    sizes: dict[tuple[int, int], int]
    """Number of panoramas of each (height, width) in pixels."""
    views: dict[tuple[int, int], int]
    """Views per panorama of each size, in the first step."""
    evaluations: dict[tuple[int, int], Evaluations]
    """View evaluations per panorama of each size."""
    cost: Cost
    controlled: int
    """View evaluations with a ControlNet, of those in `cost`."""
    truncation: Truncation | None
    """Prompts that are too long for the text encoder; None if unknown."""
    licences: list[str]
    """Licences of the weights that users should read."""
    gpu_memory: GpuMemory | None
    """GPU memory of the models and their activations; None if unknown or if no GPU is used."""


def forecast(run: ResolvedRun, assume_spec: bool = False) -> Forecast:
    """Check a plan. Raises UserError for the first size, stride or setting that cannot work.

    `assume_spec`: if the backbone's config files are not available, plan with the shapes that its family shares; and
    only note licences that must be accepted before anything is sampled.
    """
    job, plan = run.job, run.plan
    if not assume_spec:
        check_licences(job.backbone)
    _check_settings(run)
    spec, assumed = _spec(run, assume_spec)
    _check_models(run, spec)
    if not assumed:
        with without_retries() if assume_spec else nullcontext():
            backbone_module(job.backbone.name).check_blocks(job.method.mad.blocks, run.files)
    own = None if assumed else _own_scheduler(run)
    steps = _evaluated_steps(run, own)
    _check_scheduler(run, own)
    layouts = _layouts(run, spec)
    for size in layouts:
        check_side(job.output.format, *size)
    _check_overlaps(run, layouts)
    _check_regions(run, spec)
    _check_guidance(run, spec)
    memory = gpu_memory(run, spec, layouts, _canvas_steps(run, spec))
    check_gpu_memory(run, memory)
    evaluations = _evaluations(run, spec, layouts, steps)
    active = _controlled_steps(run, steps)
    controlled = _evaluations(run, spec, layouts, [step for step in steps if step in active])
    return Forecast(
        spec=spec,
        spec_is_assumed=assumed,
        sizes=dict(sizes(plan)),
        views={size: layout.at(0).count for size, layout in layouts.items()},
        evaluations=evaluations,
        cost=replace(total_cost(plan, evaluations, job.output.format), pictures=_encoded_pictures(run)),
        controlled=total_cost(plan, controlled, job.output.format).view_evaluations,
        truncation=count_truncated(run),
        licences=licence_notes(job.backbone),
        gpu_memory=memory,
    )


def _check_settings(run: ResolvedRun) -> None:
    """Raise UserError for settings that cannot work with any backbone."""
    job = run.job
    job.monitor.wandb.chosen_mode()  # raises for an unknown mode of the environment
    if job.output.upload is not None:
        check_client_installed("output.upload", job.output.upload)
    _check_adapters(run)


def _check_models(run: ResolvedRun, spec: BackboneSpec) -> None:
    """Raise UserError for weights that do not exist or do not fit, and a quantization that is not supported."""
    backbone = run.job.backbone
    check_variant(run.files)
    if backbone.quantization is not None:
        if not spec.joint_attention:
            raise UserError(f"backbone.quantization={backbone.quantization} is not supported for UNets; set it to null")
        check_quantization(backbone.quantization)
    for lora in backbone.loras:
        check_lora(lora.weights, run.files)


def _check_guidance(run: ResolvedRun, spec: BackboneSpec) -> None:
    """Raise UserError for a guidance without effect."""
    sampling = run.job.sampling
    spec.check_guidance(sampling.guidance_scale, [run.plan.prompts.header.totals.negative])
    if sampling.guidance_steps is not None and spec.guidance != "cfg":
        raise UserError("sampling.guidance_steps has no effect: the backbone embeds its guidance scale; leave it null")


def _check_adapters(run: ResolvedRun) -> None:
    """Raise UserError for a ControlNet or an IP-Adapter that does not exist, or that the method does not support."""
    backbone, method = run.job.backbone, Method.from_config(run.job.method)
    backbone.check_adapters()
    controlled, styled = backbone.controlnet.weights is not None, backbone.ip_adapter.weights is not None
    method.check_adapters(controlled, styled)
    if backbone.controlnet.weights is not None:
        controlnet_id(backbone.controlnet.weights)
    ip_adapter_files(backbone.ip_adapter)


def _controlled_steps(run: ResolvedRun, steps: list[int]) -> frozenset[int]:
    """Return the steps in which the ControlNet acts; none without one."""
    config = run.job.backbone.controlnet
    return frozenset() if config.weights is None else config.active_steps(len(set(steps)))


def view_costs(run: ResolvedRun) -> dict[tuple[int, int], Evaluations]:
    """Return the view evaluations per panorama of each size, without further checks."""
    spec, assumed = _spec(run, assume=True)
    steps = _evaluated_steps(run, None if assumed else _own_scheduler(run))
    return _evaluations(run, spec, _layouts(run, spec), steps)


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


def _own_scheduler(run: ResolvedRun) -> dict[str, Any] | None:
    """Return the config of the checkpoint's own scheduler; None if it is not on this machine."""
    backbone = run.job.backbone
    with without_retries():
        return backbone_module(backbone.name).own_scheduler(run.files, backbone.prediction_type)


def _check_scheduler(run: ResolvedRun, own: dict[str, Any] | None) -> None:
    """Raise UserError if the scheduler does not exist, or cannot bootstrap regions or start from pictures."""
    job, plan = run.job, run.plan
    name, starts = job.sampling.scheduler, job.sampling.init.strength is not None
    if name is None and (has_regions(plan) or starts):
        name = (own or {}).get("_class_name")
    if name is not None and starts:
        config = {**(own or {}), **job.sampling.scheduler_options}
        check_start_scheduler(backbone_module(job.backbone.name).scheduler_class(name), config)
    if name is not None:
        regions = (plan.prompts[row].regions for row in plan.prompts.rows_with_regions())
        steps = Method.from_config(job.method).bootstrapped_steps(job.denoising_steps)
        check_regions_scheduler(backbone_module(job.backbone.name).scheduler_class(name), regions, steps)


def view_geometry(run: ResolvedRun) -> Geometry:
    """Return the geometry of a run's views, from the backbone's config files."""
    return _geometry(run, _spec(run, assume=False)[0])


def evaluated_steps(run: ResolvedRun) -> list[int]:
    """Return the step of each evaluation of the denoiser, from the scheduler's config file."""
    return _evaluated_steps(run, _own_scheduler(run))


def _evaluated_steps(run: ResolvedRun, own: dict[str, Any] | None) -> list[int]:
    steps = backbone_module(run.job.backbone.name).evaluated_steps(own, run.job.sampling)
    left = run.job.denoising_steps
    return _last_steps(steps, run.job.sampling.num_inference_steps - left, left)


def _last_steps(steps: list[int], skipped: int, left: int) -> list[int]:
    """Return the step of each evaluation, counted from 0, if the first steps do not run; see `FromPictures.first`."""
    if not skipped:
        return steps
    order = steps.count(0)  # schedulers of second order take two evaluations a step
    numbers: dict[int, int] = {}
    return [numbers.setdefault(step, len(numbers)) for step in steps[skipped * order :]] if left else []


def _geometry(run: ResolvedRun, spec: BackboneSpec) -> Geometry:
    return Geometry.from_config(spec, run.job.method)


def _layouts(run: ResolvedRun, spec: BackboneSpec) -> dict[tuple[int, int], Layout]:
    geometry = _geometry(run, spec)
    layouts = {}
    for size in sizes(run.plan):
        try:
            layouts[size] = geometry.build(*size, run.job.sampling.loop)
        except UserError as error:
            raise UserError(f"{_row_of_size(run, size)}{error}") from error
    return layouts


def _check_overlaps(run: ResolvedRun, layouts: dict[tuple[int, int], Layout]) -> None:
    """Raise UserError for a merge of views that never overlap, and for SyncDiffusion of single views."""
    method, steps = run.job.method, run.job.denoising_steps
    if run.directory.manifest.exists() or not steps:  # datasets of earlier versions can be resumed
        return
    if method.sync.weight and all(layout.at(0).count == 1 for layout in layouts.values()):
        raise UserError("method.sync compares views, but each panorama is a single view; set method.sync.weight to 0")
    unmerged = (layout.at(step) for layout in layouts.values() for step in range(method.mad.merged_steps, steps))
    overlaps = (views.rows.depth > 1 or views.columns.depth > 1 for views in unmerged)
    if not method.merge.is_mean and not method.merge.reference_steps and not any(overlaps):
        raise UserError(f"{method.merge.summary} has no effect: the views do not overlap; remove it")


def _row_of_size(run: ResolvedRun, size: tuple[int, int]) -> str:
    """Return the location of the first row of a size, for messages; empty if it is the job's size."""
    if size == (run.job.sampling.height, run.job.sampling.width):
        return ""
    prompts = run.plan.prompts
    row = next(row for row, prompt in enumerate(prompts) if (prompt.height, prompt.width) == size)
    return f"{prompts.location(row)}: "


def _evaluations(
    run: ResolvedRun, spec: BackboneSpec, layouts: dict[tuple[int, int], Layout], steps: list[int]
) -> dict[tuple[int, int], Evaluations]:
    """Count the view evaluations per panorama of each size; `steps`: the step of each evaluation."""
    job, sampling = run.job, run.job.sampling
    guided = set(steps if sampling.guidance_steps is None else range(*sampling.guidance_steps))
    twice = spec.is_guided(sampling.guidance_scale)
    passes = [(step, twice and step in guided) for step in steps]
    bootstrapped = Method.from_config(job.method).bootstrapped_steps(job.denoising_steps)
    reference, canvas = job.method.merge.reference_steps, _canvas_steps(run, spec)
    view_size = _geometry(run, spec).view_size
    return {
        size: view_evaluations(layout, passes, job.method.sync, bootstrapped, reference, canvas, view_size)
        for size, layout in layouts.items()
    }


def _canvas_steps(run: ResolvedRun, spec: BackboneSpec) -> int:
    """Return the number of first steps in which a transformer runs the canvas as one view."""
    merging, sync = Method.from_config(run.job.method).merging, run.job.method.sync
    equals_canvas = spec.joint_attention and merging.positions == "canvas" and ALL in merging.blocks
    return merging.steps if equals_canvas and not sync.weight else 0


def _encoded_pictures(run: ResolvedRun) -> int:
    """Return the number of pictures that are encoded to start from."""
    if "image" not in run.job.picture_columns:
        return 0
    if run.job.sampling.init.strength == 1:  # what is not kept is not encoded
        return run.plan.samples_per_prompt * sum(prompt.keeps_pixels for prompt in run.plan.prompts)
    return run.plan.samples


def _check_regions(run: ResolvedRun, spec: BackboneSpec) -> None:
    """Raise UserError for the first prompt with a mask that does not fit its panorama."""
    checked, prompts, method = set(), run.plan.prompts, Method.from_config(run.job.method)
    for prompt in (prompts[row] for row in prompts.rows_with_regions()):
        method.check_regions([prompt.regions])
        for region in prompt.regions:
            case = (region.mask, prompt.height, prompt.width)
            if case not in checked:
                checked.add(case)
                try:
                    cell_weights(*case, spec.factor, run.job.sampling.loop)
                except UserError as error:
                    raise UserError(f"prompt {prompt.id}: {error}") from error
