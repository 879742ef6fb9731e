"""Build the JSON of a sample: everything needed to reproduce it, without times, hosts or workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from madgen.config.schema import Job
from madgen.dataset.format import Manifest
from madgen.images.masks import embed_mask
from madgen.types import Prompt, Task


def sample_settings(job: Job, manifest: Manifest) -> dict[str, Any]:
    """Return the part of the JSON that all samples of a job share.

    Models are identified by their content. Their locations are in `dataset.json` alone: the same weights in another
    folder give the same bytes, and no local path is published with a sample.
    """
    identity = manifest.identity
    return {
        "backbone": identity["backbone"],
        "method": identity["method"],
        "sampling": identity["sampling"],
        "safety": identity["safety"],
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
        **({} if task.blend is None else {"blend": asdict(task.blend)}),
        "height": prompt.height,
        "width": prompt.width,
        **({"columns": dict(prompt.columns)} if prompt.columns else {}),
        **({"regions": [embed_mask(region).as_dict() for region in prompt.regions]} if prompt.regions else {}),
        **recorded_pictures(prompt),
        **settings,
    }


def recorded_pictures(prompt: Prompt) -> dict[str, Any]:
    """Return the part of a sample's JSON that identifies its pictures: their checksums, and the place of the image."""
    pictures = {"pictures": {name: file.sha256 for name, file in prompt.pictures.items()}} if prompt.pictures else {}
    return {**pictures, **({"place": list(prompt.place)} if prompt.place is not None else {})}


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


def with_locations(metadata: Mapping[str, Any], manifest: Manifest, pretrained: str | None = None) -> dict[str, Any]:
    """Return a copy of a sample's JSON with the locations of its models, from the job in `dataset.json`.

    `pretrained` replaces that of the backbone. The JSON of earlier versions has the locations already.
    """
    job = {name: manifest.setting(f"job.{name}", dict) for name in ("backbone", "safety") if name in manifest.job}
    backbone, safety = job.get("backbone", {}), job.get("safety", {})
    located = {name: backbone.get(name) for name in ("pretrained", "revision", "config")} | metadata["backbone"]
    if pretrained is not None:
        located |= {"pretrained": pretrained, "revision": None}
    places = [lora.get("weights") if isinstance(lora, dict) else None for lora in backbone.get("loras") or []]
    loras = located.get("loras") or []
    places += [None] * (len(loras) - len(places))
    located["loras"] = [{"weights": place} | lora for place, lora in zip(places, loras, strict=False)]
    for name in ("controlnet", "ip_adapter"):
        if name in located:
            located[name] = (backbone.get(name) or {}) | located[name]
    checker = metadata.get("safety")
    checked = None if checker is None else {"checker": safety.get("checker")} | checker
    return {**metadata, "backbone": located, "safety": checked}
