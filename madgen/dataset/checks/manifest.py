"""Check that `dataset.json` agrees with itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from madgen.dataset.format import Manifest, PlanTotals
from madgen.dataset.records import to_json

SAME = (("name",), ("backbone", "name"), ("output", "format"))
"""Settings that the identity takes from the job as they are."""


def identity_hash(identity: dict[str, Any]) -> str:
    """Return the fingerprint of an identity."""
    return hashlib.blake2b(to_json(identity), digest_size=16).hexdigest()


def manifest_problems(manifest: Manifest) -> list[str]:
    """Return the contradictions in `dataset.json`."""
    if identity_hash(manifest.identity) != manifest.fingerprint:
        return ["dataset.json: its fingerprint is not that of its identity"]
    problems = [*_check_job(manifest.identity, manifest.job), *_check_plan(manifest.identity, manifest.plan)]
    if manifest.identity.get("filtered") != manifest.filtered:
        problems.append("its filtered is not that of its identity")
    return [f"dataset.json: {problem}" for problem in problems]


def _check_job(identity: dict[str, Any], job: dict[str, Any]) -> Iterator[str]:
    """Compare the settings that the identity and the job both have."""
    for path in SAME:
        expected, value = _value(identity, path), _value(job, path)
        if None not in (expected, value) and expected != value:
            yield f"its job says {'.'.join(path)} {value!r:.60}, its identity {expected!r:.60}"


def _value(content: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _check_plan(identity: dict[str, Any], plan: PlanTotals) -> Iterator[str]:
    if plan.samples_per_shard < 1 or plan.shards != -(-plan.samples // plan.samples_per_shard):
        yield f"its plan has {plan.shards} shards of {plan.samples_per_shard} samples for {plan.samples} samples"
    prompts = identity.get("prompts")
    each = prompts.get("samples_per_prompt") if isinstance(prompts, dict) else None
    if each is not None and "filtered" not in identity and plan.samples != each * plan.prompts:
        yield f"its plan has {plan.samples} samples for {plan.prompts} prompts, {each} each"
