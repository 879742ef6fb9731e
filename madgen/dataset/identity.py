"""The identity of a dataset: everything that affects its bytes. Its hash is the fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from madgen.config.schema import UNETS, BlendConfig, Job, MergeConfig, NoiseConfig
from madgen.dataset.plan import Plan, has_regions
from madgen.dataset.records import to_json
from madgen.hub.adapters import controlnet_id, ip_adapter_files, ip_adapter_id, lora_id
from madgen.hub.auxiliary_models import checker_id, clip_id
from madgen.hub.weights import require_local, weights_id
from madgen.images import scores
from madgen.images.embedded_metadata import VERSION as EMBEDDED

LATER_SETTINGS = {"merge": MergeConfig, "noise": NoiseConfig}
"""Parts of `method` that datasets of earlier versions do not have."""
LATER_BACKBONE = ("max_sequence_length", "prediction_type", "quantization")
"""Settings of `backbone` that datasets of earlier versions do not have; they are recorded unless they are null."""


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a short hash of an identity."""
    return hashlib.blake2b(to_json(identity), digest_size=16).hexdigest()


@dataclass(frozen=True)
class WeightIds:
    """Content hashes, or Hub commits, of the models that a job uses."""

    backbone: str
    loras: tuple[str, ...] = ()
    controlnet: str | None = None
    ip_adapter: str | None = None
    safety: str | None = None
    clip: str | None = None

    @classmethod
    def of(cls, job: Job, config: str | None = None) -> WeightIds:
        """Identify the models of a job. Raises UserError for the first one that is not on this machine.

        `config` is the model config of a single-file checkpoint if the job does not name one.
        """
        pretrained, config = job.backbone.pretrained, job.backbone.config or config
        named = f"backbone.config={config} of backbone.pretrained" if config else "backbone.pretrained"
        backbone = require_local(weights_id(pretrained, job.backbone.revision, config), f"{named}={pretrained}")
        loras = [require_local(lora_id(lora.weights), f"the LoRA {lora.weights}") for lora in job.backbone.loras]
        control, checker, clip = job.backbone.controlnet.weights, job.safety.checker, job.scores.clip
        files = ip_adapter_files(job.backbone.ip_adapter)
        return cls(
            backbone,
            tuple(loras),
            control and require_local(controlnet_id(control), f"backbone.controlnet.weights={control}"),
            files and require_local(ip_adapter_id(files), f"backbone.ip_adapter.weights={files.weights}"),
            checker and require_local(checker_id(checker), f"safety.checker={checker}"),
            clip and require_local(clip_id(clip), f"scores.clip={clip}"),
        )


def job_identity(job: Job, plan: Plan, dtype: str, weights: WeightIds) -> dict[str, Any]:
    """Return everything that affects the bytes of the shards, and nothing else (no devices, batch size, monitor)."""
    resolved = job.as_dict()
    return {
        "backbone": {
            "name": job.backbone.name,
            "weights": weights.backbone,
            "variant": job.backbone.variant,
            "dtype": dtype,
            **({"compile": True} if job.backbone.compile else {}),
            **{name: value for name in LATER_BACKBONE if (value := getattr(job.backbone, name)) is not None},
            "loras": [
                {"id": digest, "scale": lora.scale}
                for digest, lora in zip(weights.loras, job.backbone.loras, strict=True)
            ],
            **_adapter("controlnet", weights.controlnet, asdict(job.backbone.controlnet), ("scale", "start", "end")),
            **_adapter("ip_adapter", weights.ip_adapter, asdict(job.backbone.ip_adapter), ("scale",)),
        },
        "method": _effective(resolved["method"], job.backbone.name, plan),
        "sampling": job.sampling.to_metadata(),
        "safety": None if weights.safety is None else {"weights": weights.safety, "action": job.safety.action},
        "scores": _scores(job, weights.clip),
        "name": job.name,
        "prompts": {
            "digest": plan.prompts_digest,
            "samples_per_prompt": plan.samples_per_prompt,
            "seed": plan.seed,
        },
        "output": {
            "format": job.output.format,
            "quality": None if job.output.format == "png" else job.output.quality,
            "samples_per_shard": job.output.samples_per_shard,
            "embedded": EMBEDDED,
            **({"key_prefix": job.output.key_prefix} if job.output.key_prefix else {}),
        },
        **({} if plan.extends is None else {"extends": plan.extends}),
    }


def _adapter(name: str, digest: str | None, settings: dict[str, Any], recorded: tuple[str, ...]) -> dict[str, Any]:
    """Return a ControlNet or an IP-Adapter with its settings, which are recorded only where there is one."""
    return {} if digest is None else {name: {"id": digest, **{each: settings[each] for each in recorded}}}


UNET_BLOCKS = ["down", "mid", "up"]
"""Recorded for `all` blocks of a UNet: what versions without `all` recorded."""


def recorded_mad(mad: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Return `method.mad` as it is recorded: like earlier versions for settings at their default."""
    recorded = {name: value for name, value in mad.items() if name != "positions" or value != "canvas"}
    if backbone in UNETS and list(mad["blocks"]) == ["all"]:
        recorded["blocks"] = UNET_BLOCKS
    return recorded


def mad_of_record(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `recorded_mad`."""
    everything = list(recorded["blocks"]) == UNET_BLOCKS
    return {**recorded, "blocks": ("all",) if everything else tuple(recorded["blocks"])}


def _effective(method: dict[str, Any], backbone: str, plan: Plan) -> dict[str, Any]:
    """Return the method without the settings of unused parts, so that they do not affect the fingerprint."""
    mad = recorded_mad(method["mad"], backbone)
    unused = method["views"]["layout"] == "whole" or (mad["steps"] == 0 and mad["cross_attention"] == "scheduled")
    effective = {
        **method,
        "mad": None if unused else mad,
        "sync": method["sync"] if method["sync"]["weight"] else None,
        "regions": method["regions"] if has_regions(plan) else None,
    }
    if not BlendConfig(**method["noise"]["blend"]).is_on:
        effective["noise"] = {name: value for name, value in method["noise"].items() if name != "blend"}
    for name, default in LATER_SETTINGS.items():  # omitted at their defaults, so that older datasets can be resumed
        if effective[name].items() <= asdict(default()).items():
            del effective[name]
    return effective


def _scores(job: Job, clip: str | None) -> dict[str, Any] | None:
    """Return the settings of the recorded scores, which affect no image; None if no scores are recorded."""
    if not job.pixel_scores and clip is None:
        return None
    return {"pixels": list(job.pixel_scores), "clip": clip, "version": scores.VERSION}
