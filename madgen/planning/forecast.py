"""Check a plan against its backbone's shapes and sum up its cost. Loads no weights, writes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

from madgen.backbones import BackboneSpec, backbone_module
from madgen.backbones._loading import check_quantization
from madgen.dataset.encoding import check_side
from madgen.dataset.plan import has_regions
from madgen.hub.adapters import controlnet_id, ip_adapter_files
from madgen.hub.license import check_licences, licence_notes
from madgen.hub.lora_layers import check_lora
from madgen.hub.model_size import check_variant
from madgen.hub.repository import without_retries
from madgen.images.masks import cell_weights
from madgen.planning.cost import Cost, total_cost
from madgen.planning.gpu_memory import GpuMemory, check_gpu_memory, gpu_memory
from madgen.planning.resolved_run import ResolvedRun
from madgen.planning.shapes import Shapes
from madgen.planning.truncation import Truncation, count_truncated
from madgen.sampling.method import Method
from madgen.sampling.scheduler_checks import check_regions_scheduler, check_start_scheduler
from madgen.utils.errors import UserError
from madgen.utils.filesystems import check_client_installed


@dataclass(frozen=True)
class Forecast:
    """Result of checking a plan."""

    shapes: Shapes
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
    shapes = Shapes(run, assume_spec)
    _check_models(run, shapes.spec)
    if not shapes.is_assumed:
        with without_retries() if assume_spec else nullcontext():
            backbone_module(job.backbone.name).check_blocks(job.method.mad.blocks, run.files)
    steps = shapes.steps
    _check_scheduler(shapes)
    for size in shapes.layouts:
        check_side(job.output.format, *size)
    _check_overlaps(shapes)
    _check_regions(shapes)
    _check_guidance(run, shapes.spec)
    memory = gpu_memory(shapes)
    check_gpu_memory(run, memory)
    active = _controlled_steps(run, steps)
    controlled = shapes.evaluations_in([step for step in steps if step in active])
    return Forecast(
        shapes=shapes,
        cost=replace(total_cost(plan, shapes.evaluations, job.output.format), pictures=_encoded_pictures(run)),
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
    backbone = run.job.backbone
    backbone.check_adapters()
    controlled, styled = backbone.controlnet.weights is not None, backbone.ip_adapter.weights is not None
    Method(run.job.method).check_adapters(controlled, styled)
    if backbone.controlnet.weights is not None:
        controlnet_id(backbone.controlnet.weights)
    ip_adapter_files(backbone.ip_adapter)


def _controlled_steps(run: ResolvedRun, steps: list[int]) -> frozenset[int]:
    """Return the steps in which the ControlNet acts; none without one."""
    config = run.job.backbone.controlnet
    return frozenset() if config.weights is None else config.active_steps(len(set(steps)))


def _check_scheduler(shapes: Shapes) -> None:
    """Raise UserError if the scheduler does not exist, or cannot bootstrap regions or start from pictures."""
    job, plan, own = shapes.run.job, shapes.run.plan, shapes.own_scheduler or {}
    name, starts = job.sampling.scheduler, job.sampling.init.strength is not None
    if name is None and (has_regions(plan) or starts):
        name = own.get("_class_name")
    if name is not None and starts:
        config = {**own, **job.sampling.scheduler_options}
        check_start_scheduler(backbone_module(job.backbone.name).scheduler_class(name), config)
    if name is not None:
        regions = (plan.prompts[row].regions for row in plan.prompts.rows_with_regions())
        steps = shapes.method.bootstrapped_steps(job.denoising_steps)
        check_regions_scheduler(backbone_module(job.backbone.name).scheduler_class(name), regions, steps)


def _check_overlaps(shapes: Shapes) -> None:
    """Raise UserError for a merge of views that never overlap, and for SyncDiffusion of single views."""
    run, layouts = shapes.run, shapes.layouts
    method, steps = run.job.method, run.job.denoising_steps
    if run.directory.manifest.exists() or not steps:  # datasets of earlier versions can be resumed
        return
    if method.sync.weight and shapes.has_single_views:
        raise UserError("method.sync compares views, but each panorama is a single view; set method.sync.weight to 0")
    unmerged = (layout.at(step) for layout in layouts.values() for step in range(method.mad.merged_steps, steps))
    overlaps = (views.rows.depth > 1 or views.columns.depth > 1 for views in unmerged)
    if not method.merge.is_mean and not method.merge.reference_steps and not any(overlaps):
        raise UserError(f"{method.merge.summary} has no effect: the views do not overlap; remove it")


def _encoded_pictures(run: ResolvedRun) -> int:
    """Return the number of pictures that are encoded to start from."""
    if "image" not in run.job.picture_columns:
        return 0
    if run.job.sampling.init.strength == 1:  # what is not kept is not encoded
        return run.plan.samples_per_prompt * sum(prompt.keeps_pixels for prompt in run.plan.prompts)
    return run.plan.samples


def _check_regions(shapes: Shapes) -> None:
    """Raise UserError for the first prompt with a mask that does not fit its panorama."""
    checked, prompts, loop = set(), shapes.run.plan.prompts, shapes.run.job.sampling.loop
    for prompt in (prompts[row] for row in prompts.rows_with_regions()):
        shapes.method.check_regions([prompt.regions])
        for region in prompt.regions:
            case = (region.mask, prompt.height, prompt.width)
            if case not in checked:
                checked.add(case)
                try:
                    cell_weights(*case, shapes.spec.factor, loop)
                except UserError as error:
                    raise UserError(f"prompt {prompt.id}: {error}") from error
