"""Checks a plan against its backbone's shapes and adds up what it will cost. Loads no weights, writes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass

from madgen.backbones import BackboneSpec, Merging, backbone_module
from madgen.composition import check_regions_scheduler
from madgen.config import Job
from madgen.errors import UserError
from madgen.geometry import Geometry
from madgen.joint.schedule import SyncSchedule
from madgen.masks import cell_weights
from madgen.plan.cost import Cost, sizes, total_cost, view_evaluations
from madgen.plan.shards import Plan
from madgen.sampler import Method, check_negative_prompts
from madgen.weights import lora_file, resolve_pretrained


@dataclass(frozen=True)
class Forecast:
    """What `madgen plan` prints."""

    spec: BackboneSpec
    spec_is_assumed: bool
    sizes: dict[tuple[int, int], int]
    """How many panoramas of each (height, width) in pixels."""
    views: dict[tuple[int, int], int]
    """Views of one panorama of each size, in the first step."""
    cost: Cost


def forecast(job: Job, plan: Plan, assume_spec: bool = False) -> Forecast:
    """UserError names the first size, stride or setting that cannot work.

    `assume_spec`: where the backbone's config files cannot be had, plan with the shapes that its family shares.
    """
    module = backbone_module(job.backbone.name)
    assumed = False
    try:
        pretrained, revision, config = job.backbone.pretrained, job.backbone.revision, job.backbone.config
        spec = module.describe(resolve_pretrained(pretrained), revision, config and resolve_pretrained(config))
    except UserError:
        if not assume_spec:
            raise
        spec, assumed = module.family_spec(job.backbone.pretrained), True
    for lora in job.backbone.loras:
        lora_file(lora.weights)  # refuses what is not there
    mad, order = job.method.mad, 1
    merging = Merging(mad.steps, mad.blocks, mad.cross_attention)
    if job.sampling.scheduler is not None:
        scheduler = module.scheduler_class(job.sampling.scheduler)
        order, bootstrapping = scheduler.order, job.method.regions.bootstrapping
        bootstrapped = Method(merging, bootstrapping=bootstrapping).bootstrapped_steps(job.sampling.num_inference_steps)
        check_regions_scheduler(scheduler, [prompt.regions for prompt in plan.prompts], bootstrapped)
    views = job.method.views
    geometry = Geometry(spec, views.layout, views.size, views.stride, merging)
    counts = sizes(plan)
    layouts = {}
    for prompt in plan.prompts:
        if (prompt.height, prompt.width) not in layouts:
            layout = geometry.build(prompt.height, prompt.width, job.sampling.loop)
            layouts[prompt.height, prompt.width] = layout
    _check_regions(job, plan, spec)
    negatives = {text for prompt in plan.prompts for text in (prompt.negative, *(r.negative for r in prompt.regions))}
    check_negative_prompts(spec, sorted(negatives), job.sampling.guidance_scale)
    passes = order * (2 if job.sampling.guidance_scale > 1 and not spec.guidance_embedded else 1)
    steps, sync = job.sampling.num_inference_steps, job.method.sync
    schedule = SyncSchedule(sync.weight, sync.decay, sync.steps, sync.every)
    evaluations = {size: view_evaluations(layout, steps, passes, schedule) for size, layout in layouts.items()}
    return Forecast(
        spec=spec,
        spec_is_assumed=assumed,
        sizes=dict(counts),
        views={size: layout.at(0).count for size, layout in layouts.items()},
        cost=total_cost(plan, evaluations, job.output.format),
    )


def _check_regions(job: Job, plan: Plan, spec: BackboneSpec) -> None:
    """Every mask must fit the panoramas that it is for; UserError names the first prompt whose masks do not."""
    checked = set()
    for prompt in plan.prompts:
        for region in prompt.regions:
            wanted = (region.mask, prompt.height, prompt.width)
            if wanted not in checked:
                checked.add(wanted)
                try:
                    cell_weights(*wanted, spec.factor, job.sampling.loop)
                except UserError as error:
                    raise UserError(f"prompt {prompt.id}: {error}") from error


def print_forecast(job: Job, plan: Plan, forecast: Forecast, as_json: bool) -> None:
    """For people, or with `as_json` for scripts."""
    cost, steps = forecast.cost, job.sampling.num_inference_steps
    content = {
        "name": job.name,
        "prompts": len(plan.prompts),
        "samples": plan.samples,
        "shards": plan.shard_count,
        "samples_per_shard": plan.samples_per_shard,
        "sizes": [
            {"height": height, "width": width, "samples": count, "views": forecast.views[height, width]}
            for (height, width), count in forecast.sizes.items()
        ],
        "view_evaluations": cost.view_evaluations,
        "megapixels": round(cost.megapixels, 3),
        "bytes": cost.bytes,
        "spec_is_assumed": forecast.spec_is_assumed,
    }
    if as_json:
        print(json.dumps(content, indent=1))
        return
    mad, disk = job.method.mad, f"about {cost.bytes / 1e6:,.0f} MB as {job.output.format}"
    print(f"{job.name}: {len(plan.prompts)} prompts, {plan.samples} panoramas in {plan.shard_count} shards")
    print(f"  to {job.output_dir}")
    for (height, width), count in forecast.sizes.items():
        print(f"  {count} of {height}x{width} px, {forecast.views[height, width]} views each")
    print(f"  {job.backbone.pretrained}, {steps} steps, MAD in the first {min(mad.steps, steps)}")
    print(f"  {cost.view_evaluations:,} UNet view evaluations, {cost.megapixels:,.1f} megapixels, {disk}")
    if forecast.spec_is_assumed:
        print(f"  note: {job.backbone.pretrained} is not at hand; planned with the shapes of its family")
