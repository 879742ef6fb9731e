"""Print a forecast as text or JSON, and its warnings."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from madgen.cluster.launch import rank
from madgen.config.schema.init import InitConfig
from madgen.config.unused_settings import unused_settings
from madgen.planning.cost import sizes
from madgen.planning.forecast import Forecast
from madgen.planning.resolved_run import ResolvedRun
from madgen.prompts.literal_syntax import literal_syntax
from madgen.utils.console import eta_text, plural, size_text

logger = logging.getLogger(__name__)


def warn(run: ResolvedRun, forecast: Forecast) -> None:
    """Warn about settings for steps that do not run, truncated prompts and syntax of other programs.

    Of several processes, only the first one warns.
    """
    if rank() != 0:
        return
    job, steps = run.job, run.job.denoising_steps
    excess = forecast.shapes.method.excess_steps(steps, job.sampling.described(steps), job.method.views.layout)
    truncated = forecast.truncation.warnings(len(run.plan.prompts)) if forecast.truncation else []
    literal = literal_syntax(run.plan.prompts)
    for line in (*excess, *unused_settings(job), *_unused(run, forecast), *literal, *truncated):
        logger.warning(line)


def _unused(run: ResolvedRun, forecast: Forecast) -> Iterator[str]:
    """Describe settings of parts that no prompt or panorama has, though later ones may."""
    prompts, job = run.plan.prompts, run.job
    bootstrapping, feather = job.method.regions.bootstrapping, job.sampling.init.feather
    if bootstrapping is not None and not any(True for _ in prompts.rows_with_regions()):
        yield f"method.regions.bootstrapping={bootstrapping} has no effect: no prompt has regions"
    if feather != InitConfig.feather and not any(prompt.keeps_pixels for prompt in prompts):
        yield f"sampling.init.feather={feather} has no effect: no prompt has a mask, or a place on a larger panorama"
    mad = job.method.mad.as_requested
    if forecast.shapes.has_single_views and job.method.mad.merged_steps and job.method.views.layout != "whole":
        setting = f"steps={mad.steps}" if mad.share is None else f"share={mad.share}"
        yield f"method.mad.{setting} has no effect: each panorama is a single view; set a larger size, or it to 0"


def print_forecast(run: ResolvedRun, forecast: Forecast, estimate: dict[str, Any], as_json: bool) -> None:
    """Print a forecast as text or JSON, with the fields of `Estimate.as_dict`."""
    if as_json:
        print(json.dumps({**_fields(run, forecast), **estimate}, indent=1))
        return
    plan = run.plan
    counts = plural(len(plan.prompts), "prompt"), plural(plan.samples, "panorama"), plural(plan.shard_count, "shard")
    print("{}: {}, {} in {}".format(run.job.name, *counts))
    for lines in (_dataset_lines(run, forecast), _cost_lines(run, forecast), _time_lines(estimate)):
        for line in lines:
            print(f"  {line}")
    for note in _notes(run, forecast):
        print(f"  note: {note}")


def _fields(run: ResolvedRun, forecast: Forecast) -> dict[str, Any]:
    plan, cost, truncation = run.plan, forecast.cost, forecast.truncation
    return {
        "name": run.job.name,
        "prompts": len(plan.prompts),
        "samples": plan.samples,
        "shards": plan.shard_count,
        "samples_per_shard": plan.samples_per_shard,
        "samples_added": run.added,
        "sizes": [
            {"height": height, "width": width, "samples": count, "views": forecast.shapes.views[height, width]}
            for (height, width), count in sizes(plan).items()
        ],
        "view_evaluations": cost.view_evaluations,
        **({"controlled_view_evaluations": forecast.controlled} if forecast.controlled else {}),
        "megapixels": round(cost.megapixels, 3),
        "bytes": cost.bytes,
        "pictures": cost.pictures,
        "gpu_memory": None if forecast.gpu_memory is None else forecast.gpu_memory.as_dict(),
        "spec_is_assumed": forecast.shapes.is_assumed,
        "licences": forecast.licences,
        "prompts_cut": None if truncation is None else truncation.prompts,
        "prompts_cut_is_exact": truncation is not None and truncation.checked == truncation.candidates,
    }


def _dataset_lines(run: ResolvedRun, forecast: Forecast) -> Iterator[str]:
    """Describe where the panoramas go, their sizes and how they are sampled."""
    job, steps, mad = run.job, run.job.denoising_steps, run.job.method.mad.merged_steps
    adds = f": adds {plural(run.added, 'panorama')}, as generation {len(run.plan.stages)}" if run.added else ""
    yield f"to {job.output_dir}{adds}"
    for (height, width), count in sizes(run.plan).items():
        yield f"{count} of {height}x{width} px, {plural(forecast.shapes.views[height, width], 'view')} each"
    merged = f"MAD in the first {mad} of them" if mad < steps else "MAD in all of them"
    if not mad or job.method.views.layout == "whole" or forecast.shapes.has_single_views:
        always = job.method.mad.cross_attention == "always"
        merged = "MAD in cross-attention only" if always else "no MAD"
    yield f"{job.backbone.pretrained}, {plural(steps, 'step')}, {merged}"
    if summary := job.method.operators:
        yield summary


def _cost_lines(run: ResolvedRun, forecast: Forecast) -> Iterator[str]:
    """Describe the evaluations, the disk space and the GPU memory."""
    job, cost = run.job, forecast.cost
    disk = f"about {size_text(cost.bytes)} as {job.output.format}"
    with_control = f" ({forecast.controlled:,} with the ControlNet)" if forecast.controlled else ""
    yield f"{cost.view_evaluations:,} view evaluations{with_control}, {cost.megapixels:,.1f} megapixels, {disk}"
    if cost.pictures:
        strength, steps = job.sampling.init.strength, job.sampling.num_inference_steps
        run_steps = f"{job.denoising_steps} of {plural(steps, 'step')} at {strength=}"
        yield f"{plural(cost.pictures, 'picture')} encoded; {run_steps}"
    yield from () if forecast.gpu_memory is None else forecast.gpu_memory.lines()


def _time_lines(estimate: dict[str, Any]) -> Iterator[str]:
    """Describe what is left, and the time that it takes if something was measured."""
    workers, wall_s, hours = estimate["workers"], estimate["wall_s"], estimate["device_hours_left"]
    if kept := estimate["samples_kept"]:
        yield f"{plural(kept, 'panorama')} of open shards will be kept"
    if not estimate["shards_left"]:
        yield "0 shards left: nothing to generate"
        return
    if hours is not None:
        per_evaluation = f"{1000 * estimate['seconds_per_view_evaluation']:.3g} ms per view evaluation"
        from_ = f"{per_evaluation}, measured on {plural(estimate['measured_shards'], 'shard')}"
        yield f"{plural(estimate['shards_left'], 'shard')} left: {hours:,.2f} device hours ({from_})"
    if wall_s is not None:
        yield f"{plural(workers, 'worker')}: {eta_text(wall_s)}"
    elif workers is not None:
        yield f"{plural(workers, 'worker')}: unknown until a shard is finished; or pass --measured DIR"


def _notes(run: ResolvedRun, forecast: Forecast) -> Iterator[str]:
    yield from forecast.licences
    if forecast.shapes.is_assumed:
        missing = f"{run.job.backbone.pretrained} is not on this machine"
        yield f"{missing}; assuming the shapes of its model family; madgen fetch downloads it"
