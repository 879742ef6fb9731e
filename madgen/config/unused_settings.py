"""Name settings that have no effect beside the other settings of a job, for example of MAD without MAD steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from madgen.config.schema.checks import as_yaml, changed
from madgen.config.schema.job import Job
from madgen.config.schema.method import MethodConfig


def unused_settings(job: Job) -> Iterator[str]:
    """Describe the settings that change nothing in the dataset of a job."""
    yield from unused_method_settings(job.method)
    output, blend = job.output, job.method.noise.blend
    if output.format == "png":
        yield from _unused("output", output, ("quality",), "with output.format=png, which is lossless")
    if job.quarantine.max_share == 1:
        yield from _unused("quarantine", job.quarantine, ("window",), "with quarantine.max_share=1, which never stops")
    if blend.is_on and blend.seed is None and job.prompts.samples_per_prompt == 1:
        yield (
            f"method.noise.blend.share={blend.share} has no effect on a prompt's first sample, which is blended with "
            "itself; set method.noise.blend.seed, or prompts.samples_per_prompt above 1"
        )


def unused_method_settings(method: MethodConfig) -> Iterator[str]:
    """Describe the settings of `method` that have no effect on any panorama."""
    mad, sync, blend = method.mad, method.sync, method.noise.blend
    attention = ("blocks", "cross_attention", "positions")
    if method.views.layout == "whole":
        why = "with layout=whole, which has a single view"
        if mad.merged_steps:
            requested = mad.as_requested
            name = "steps" if requested.share is None else "share"
            yield from _unused("method.mad", requested, (name,), f"{why}; set it to 0")
        yield from _unused("method.mad", mad, attention, why)
    elif not mad.merged_steps:
        always = mad.cross_attention == "always"
        yield from _unused(
            "method.mad", mad, attention[2:] if always else attention, "with method.mad.steps=0, which disables MAD"
        )
    if not sync.weight:
        others = [name for name in changed(sync) if name != "weight"]
        yield from _unused("method.sync", sync, others, "without method.sync.weight; set it")
    if not blend.is_on and blend.seed is not None:
        yield from _unused("method.noise.blend", blend, ("seed",), "without method.noise.blend.share; set it")


def _unused(section: str, config: Any, names: Iterable[str], why: str) -> Iterator[str]:
    """Yield those of the settings that differ from their defaults."""
    values = changed(config)
    for name in names:
        if name in values:
            remove = ", or remove it" if "; " in why else "; remove it"
            yield f"{section}.{name}={as_yaml(values[name])} has no effect {why}{remove}"
