"""Check that `dataset.json` does not contradict itself."""

from __future__ import annotations

from collections.abc import Iterator

from madgen.dataset.format import Manifest
from madgen.dataset.identity import fingerprint

SAME = ("name", "backbone.name", "output.format")
"""Settings that the identity takes from the job as they are."""


def manifest_problems(manifest: Manifest) -> list[str]:
    """Return the contradictions in `dataset.json`."""
    if fingerprint(manifest.identity) != manifest.fingerprint:
        return ["dataset.json: its fingerprint is not that of its identity"]
    problems = [*_check_job(manifest), *_check_plan(manifest)]
    problems += _check_generations(manifest) if manifest.filtered is None else []
    for number, source in enumerate(manifest.sources or (), 1):
        problems += [
            f"source {number}: {problem.removeprefix('dataset.json: ')}" for problem in manifest_problems(source)
        ]
    if manifest.identity.get("filtered") != manifest.filtered:
        problems.append("its filtered is not that of its identity")
    return [f"dataset.json: {problem}" for problem in problems]


def _check_job(manifest: Manifest) -> Iterator[str]:
    """Compare the settings that the identity and the job both have."""
    for section in ("backbone", "method", "sampling", "prompts", "output"):
        if section in manifest.identity and section not in manifest.job:
            yield f"its job has no {section}"
    for path in SAME:
        expected, value = manifest.value(f"identity.{path}"), manifest.value(f"job.{path}")
        if None not in (expected, value) and expected != value:
            yield f"its job says {path} {value!r:.60}, its identity {expected!r:.60}"


def _check_plan(manifest: Manifest) -> Iterator[str]:
    plan, portions = manifest.plan, manifest.portions()
    shards = [-(-portion.samples // portion.samples_per_shard) for portion in portions if portion.samples_per_shard > 0]
    if [portion.shards for portion in portions] != shards or plan.samples_per_shard < 1:
        yield f"its plan has {plan.shards} shards of {plan.samples_per_shard} samples for {plan.samples} samples"
    elif (sum(shards), sum(portion.samples for portion in portions)) != (plan.shards, plan.samples):
        yield f"its plan has {plan.samples} samples in {plan.shards} shards, its parts have others"
    each = manifest.value("identity.prompts.samples_per_prompt")
    generated = manifest.filtered is None and not manifest.sources
    if each is not None and generated and plan.samples != each * plan.prompts:
        yield f"its plan has {plan.samples} samples for {plan.prompts} prompts, {each} each"


def _check_generations(manifest: Manifest) -> Iterator[str]:
    """Compute the fingerprint of each generation from the identity of the last one."""
    generations, extends = manifest.generations or (), None
    if not generations:
        return
    for number, generation in enumerate(generations, 1):
        prompts = dict(manifest.identity.get("prompts") or {})
        prompts |= {"digest": generation.prompts_digest, "samples_per_prompt": generation.samples_per_prompt}
        identity = {name: value for name, value in manifest.identity.items() if name != "extends"}
        identity |= {"prompts": prompts, **({"extends": extends} if extends else {})}
        if fingerprint(identity) != generation.fingerprint:
            yield f"the fingerprint of its generation {number} is not that of its identity"
            return
        extends = generation.fingerprint
    if generations[-1].fingerprint != manifest.fingerprint:
        yield "its last generation does not have its fingerprint"
    if sum(generation.prompts for generation in generations) != manifest.plan.prompts:
        yield f"its plan has {manifest.plan.prompts} prompts, its generations have others"
