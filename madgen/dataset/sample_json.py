"""Build and read the JSON of a sample: everything needed to reproduce it, without times, hosts or workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from madgen.config.schema import (
    BackboneConfig,
    BlendConfig,
    ControlNetConfig,
    IpAdapterConfig,
    Job,
    LoraConfig,
    MadConfig,
    MergeConfig,
    MethodConfig,
    NoiseConfig,
    RegionsConfig,
    SamplingParams,
    SyncConfig,
    ViewsConfig,
)
from madgen.dataset.format import Manifest
from madgen.dataset.identity import mad_of_record
from madgen.images.masks import embed_mask
from madgen.types import NoiseBlend, PictureFile, Prompt, Region, Task

Adapter = TypeVar("Adapter", ControlNetConfig, IpAdapterConfig)


def sample_settings(job: Job, manifest: Manifest) -> dict[str, Any]:
    """Return the part of the JSON that all samples of a job share.

    Models are identified by their content. Their locations are in `dataset.json` alone: the same weights in another
    folder give the same bytes, and no local path is published with a sample.
    """
    settings = {name: manifest.identity[name] for name in ("backbone", "method", "sampling", "safety")}
    return {**settings, "job_seed": job.prompts.seed, "fingerprint": manifest.fingerprint}


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
    backbone, safety = manifest.job.get("backbone", {}), manifest.job.get("safety", {})
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


class SampleInputs(NamedTuple):
    """Everything that a panorama is sampled from."""

    backbone: BackboneConfig
    method: MethodConfig
    params: SamplingParams
    task: Task


def recorded_inputs(metadata: Mapping[str, Any], pictures: dict[str, PictureFile]) -> SampleInputs:
    """Read the JSON of a sample, after `with_locations`; `pictures`: those that it identifies.

    Raises LookupError, TypeError or ValueError if something is missing or wrong.
    """
    method, params = _method(metadata["method"]), SamplingParams.from_metadata(metadata["sampling"])
    return SampleInputs(_backbone(metadata["backbone"]), method, params, _task(metadata, pictures))


def _backbone(recorded: Mapping[str, Any]) -> BackboneConfig:
    later = ("compile", "max_sequence_length", "prediction_type", "quantization")
    return BackboneConfig(
        **{name: recorded[name] for name in ("name", "pretrained", "revision", "variant", "config")},
        **{name: recorded[name] for name in later if name in recorded},
        loras=[LoraConfig(weights=lora["weights"], scale=lora["scale"]) for lora in recorded["loras"]],
        controlnet=adapter_config(ControlNetConfig, recorded.get("controlnet", {})),
        ip_adapter=adapter_config(IpAdapterConfig, recorded.get("ip_adapter", {})),
        dtype=recorded.get("weights_dtype", recorded["dtype"]),
    )


def adapter_config(config: type[Adapter], recorded: Mapping[str, Any]) -> Adapter:
    """Return the settings of a ControlNet or an IP-Adapter as it is recorded."""
    return config(**{name: value for name, value in recorded.items() if name != "id"})


def _method(recorded: Mapping[str, Any]) -> MethodConfig:
    noise = recorded.get("noise", {})
    return MethodConfig(
        views=ViewsConfig(**recorded["views"]),
        mad=MadConfig(**mad_of_record(recorded["mad"])) if recorded["mad"] else MadConfig(steps=0),
        merge=MergeConfig(**recorded.get("merge", {})),
        noise=NoiseConfig(**{**noise, "blend": BlendConfig(**noise.get("blend", {}))}),
        sync=SyncConfig(**(recorded["sync"] or {})),
        regions=RegionsConfig(**(recorded["regions"] or {})),
    )


def _task(metadata: Mapping[str, Any], pictures: dict[str, PictureFile]) -> Task:
    text, negative, size = metadata["prompt"], metadata["negative_prompt"], (metadata["height"], metadata["width"])
    regions = tuple(Region.from_dict(region) for region in metadata.get("regions", []))
    place = tuple(metadata["place"]) if "place" in metadata else None
    prompt = Prompt(metadata["prompt_id"], text, negative, *size, regions=regions, pictures=pictures, place=place)
    blend = None if metadata.get("blend") is None else NoiseBlend(**metadata["blend"])
    return Task(metadata["key"], prompt, metadata["sample_index"], metadata["seed"], blend)
