"""Build the JSON of a sample: everything needed to reproduce it, without times, hosts or workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from madgen.config.schema import Job
from madgen.dataset.format import Manifest
from madgen.images.masks import embed_mask
from madgen.types import Task


def sample_settings(job: Job, manifest: Manifest) -> dict[str, Any]:
    """Return the part of the JSON that all samples of a job share."""
    identity, backbone = manifest.identity, job.backbone
    source = {"pretrained": backbone.pretrained, "revision": backbone.revision, "config": backbone.config}
    loras = zip(backbone.loras, identity["backbone"]["loras"], strict=True)
    return {
        "backbone": {
            **source,
            **identity["backbone"],
            "loras": [{"weights": lora.weights, **entry} for lora, entry in loras],
        },
        "method": identity["method"],
        "sampling": identity["sampling"],
        "safety": identity["safety"] and {"checker": job.safety.checker, **identity["safety"]},
        "job_seed": job.prompts.seed,
        "fingerprint": manifest.fingerprint,
    }


def sample_metadata(task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of a sample; `settings` are those of `sample_settings`."""
    prompt = task.prompt
    return {
        "key": task.key,
        "prompt_id": prompt.id,
        "sample_index": task.sample_index,
        "prompt": prompt.text,
        "negative_prompt": prompt.negative,
        "seed": task.seed,
        "height": prompt.height,
        "width": prompt.width,
        **({"columns": dict(prompt.columns)} if prompt.columns else {}),
        **({"regions": [embed_mask(region).as_dict() for region in prompt.regions]} if prompt.regions else {}),
        **settings,
    }


def with_changes(metadata: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a sample's JSON with `Attempt.changes` merged into it, recursively."""
    changed = dict(metadata)
    for key, value in changes.items():
        before = changed.get(key)
        nested = isinstance(before, Mapping) and isinstance(value, Mapping)
        changed[key] = with_changes(before or {}, value) if nested else value
    return changed


def with_scores(metadata: Mapping[str, Any], scores: Mapping[str, float]) -> dict[str, Any]:
    """Return a copy of a sample's JSON with these scores added."""
    return with_changes(metadata, {"scores": scores} if scores else {})
