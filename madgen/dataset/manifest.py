"""Build and check `dataset.json`, whose fingerprint prevents different jobs from sharing a directory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from madgen.config.schema import UNETS, BlendConfig, Job, MergeConfig, NoiseConfig
from madgen.dataset.belonging import has_shards_of
from madgen.dataset.checks.manifest import identity_hash, manifest_problems
from madgen.dataset.format import FormatError, Manifest, PlanTotals, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan, has_regions
from madgen.hub.license import licences
from madgen.hub.weights import (
    checker_id,
    clip_id,
    controlnet_id,
    ip_adapter_files,
    ip_adapter_id,
    lora_id,
    require_local,
    weights_id,
)
from madgen.images import scores
from madgen.images.embedded_metadata import VERSION as EMBEDDED
from madgen.utils.atomic import hard_link, sync_directory, temporary_path, write_atomically
from madgen.utils.errors import STORAGE_ERRORS, UserError

LATER_SETTINGS = {"merge": MergeConfig, "noise": NoiseConfig}
"""Parts of `method` that datasets of earlier versions do not have."""
VERSIONED = ("madgen", "torch", "diffusers", "transformers", "lightning", "webdataset", "pillow")


def identity(
    job: Job,
    plan: Plan,
    dtype: str,
    weights: str,
    loras: list[str],
    checker: str | None = None,
    clip: str | None = None,
    controlnet: str | None = None,
    ip_adapter: str | None = None,
) -> dict[str, Any]:
    """Return everything that affects the bytes of the shards, and nothing else (no devices, batch size, monitor)."""
    resolved = job.as_dict()
    return {
        "backbone": {
            "name": job.backbone.name,
            "weights": weights,
            "variant": job.backbone.variant,
            "dtype": dtype,
            **({"compile": True} if job.backbone.compile else {}),
            **_chosen(job, "max_sequence_length", "prediction_type", "quantization"),
            "loras": [
                {"id": digest, "scale": lora.scale} for digest, lora in zip(loras, job.backbone.loras, strict=True)
            ],
            **_adapter("controlnet", controlnet, asdict(job.backbone.controlnet), ("scale", "start", "end")),
            **_adapter("ip_adapter", ip_adapter, asdict(job.backbone.ip_adapter), ("scale",)),
        },
        "method": _effective(resolved["method"], job.backbone.name, plan),
        "sampling": job.sampling.to_metadata(),
        "safety": None if checker is None else {"weights": checker, "action": job.safety.action},
        "scores": _scores(job, clip),
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


def _chosen(job: Job, *names: str) -> dict[str, Any]:
    """Return settings of the backbone that are not null: earlier versions recorded none of them."""
    values = {name: getattr(job.backbone, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


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


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a short hash of `identity`."""
    return identity_hash(identity)


def manifest(job: Job, plan: Plan, identity: dict[str, Any]) -> Manifest:
    """Return the content of `dataset.json`."""
    own, versions = fingerprint(identity), {name: _version(name) for name in VERSIONED}
    generations = [stage.generation for stage in plan.grown if stage.generation is not None]
    if generations:
        newest = generations[-1]
        generations[-1] = replace(newest, fingerprint=own, versions=newest.versions or versions)
    return Manifest(
        own,
        job.as_dict(),
        plan_totals(plan),
        identity,
        licence=licences(job.backbone),
        versions=versions,
        generations=tuple(generations) or None,
    )


def plan_totals(plan: Plan) -> PlanTotals:
    """Return the totals of a plan."""
    return PlanTotals(len(plan.prompts), plan.samples, plan.shard_count, plan.samples_per_shard, plan.keys_digest)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_directory(directory: DatasetDir, content: Manifest | None, resume: str, why: str | None = None) -> None:
    """Raise UserError if a directory holds another job's dataset or other files; write nothing.

    `content` is the manifest of the job, or None if it is not known yet. `why`: the reason why the job's prompts cannot
    extend those of the dataset.
    """
    root = directory.root
    occupied = next((path for path in (root, *root.parents) if path.exists()), root)
    if not occupied.is_dir():
        raise UserError(f"output.dir={root}: {occupied} is a file; choose a directory")
    if directory.manifest.exists():
        if not directory.manifest.is_file():
            raise UserError(f"{directory.manifest} is not a file; remove it, or choose another output.dir")
        try:
            existing = directory.read_manifest()
        except FormatError:
            if content is not None and not has_shards_of(directory, content):
                raise
            return  # `create` writes it again
        if existing.made_by is not None:
            what = "wrote" if existing.filtered is None else "chose of a dataset"
            raise UserError(f"output.dir={root} holds what madgen {existing.made_by} {what}; choose another")
        if resume == "never":
            raise UserError(f"output.dir={root} holds a dataset already and output.resume=never; choose another")
        changed = [] if content is None else _changed(existing, content, resume)
        if changed or why is not None:
            listed = f" ({'; '.join(changed)})" if changed else ""
            only_prompts = all(line.startswith("prompts.") for line in changed)
            fix = "set output.resume=extend to add prompts or samples to it, or " if only_prompts else ""
            fix = f"output.resume=extend only adds to it, and {why}; " if why is not None else fix
            raise UserError(
                f"output.dir={root} holds a dataset of another job{listed}; "
                f"{fix}choose another output.dir, or remove this one"
            )
    elif root.is_dir() and any(not entry.name.startswith(".") for entry in os.scandir(root)):
        raise UserError(f"output.dir={root} is not empty and holds no madgen dataset; choose another")


PROMPT_KEYS = ("prompts.", "sampling.height", "sampling.width")
GROWING = ("extends: ", "prompts.digest: ", "prompts.samples_per_prompt: ")
"""Differences of identities that a next generation may have."""


def _changed(existing: Manifest, content: Manifest, resume: str) -> list[str]:
    """Return why a job cannot resume a dataset: the differences of their identities.

    Empty if the job is that of a generation of the dataset, or its next one. Digests of prompts are replaced by the
    keys of the job that differ.
    """
    if content.fingerprint == existing.fingerprint or is_earlier(existing, content):
        return []
    changes = differences(existing.identity, content.identity)
    if resume == "extend" and extends(existing, content):
        return [line for line in changes if not line.startswith(GROWING)]
    changes = [line for line in changes if not line.startswith("extends: ")]
    if not any(line.startswith("prompts.digest") for line in changes):
        return changes
    job_changes = [line for line in differences(existing.job, content.job) if line.startswith(PROMPT_KEYS)]
    others = [line for line in changes if not line.startswith("prompts.")]
    return [*others, *(job_changes or ["prompts.source: other prompts or masks now"])]


def is_earlier(existing: Manifest, content: Manifest) -> bool:
    """Return whether a dataset has grown since the job of `content`, whose shards it still has."""
    return content.fingerprint in {generation.fingerprint for generation in (existing.generations or ())[:-1]}


def extends(existing: Manifest, content: Manifest) -> bool:
    """Return whether `content` is planned as the next generation of a dataset."""
    generations = content.generations or ()
    return len(generations) > 1 and generations[-2].fingerprint == existing.fingerprint


def extend(directory: DatasetDir, content: Manifest) -> None:
    """Record the next generation in `dataset.json`. Only one process may do so at a time."""
    if extends(directory.read_manifest(), content):
        write_atomically(directory.manifest, content.to_json())


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return one line for every leaf that differs, with its key, old value and new value."""
    changes: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{key}.")
        elif _plain(before) != _plain(after):
            changes.append(f"{prefix}{key}: {_as_yaml(before, key)} there, {_as_yaml(after, key)} here")
    return changes


def _as_yaml(value: Any, key: str) -> Any:
    """Format a value as in a job file."""
    if value is None and key == "compile":  # omitted from the identity if off
        return "false"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def create(directory: DatasetDir, content: Manifest, resume: str = "if_same") -> None:
    """Write `dataset.json` unless it exists. Of concurrent workers, one writes it, the others compare theirs.

    A damaged one is written again if it, or the finished shards, are of the same job.
    """
    temporary = temporary_path(directory.manifest)
    created = [path for path in (directory.root, *directory.root.parents) if not path.exists()]
    try:
        _link_new(temporary, directory, content, resume)
    except UserError:
        for path in created:
            with contextlib.suppress(OSError):  # not created, or in use by another process
                path.rmdir()
        raise
    sync_directory(directory.root)
    directory.shards.mkdir(exist_ok=True)


def _link_new(temporary: Path, directory: DatasetDir, content: Manifest, resume: str) -> None:
    """Write `dataset.json` by a hard link, which unlike a rename fails if the file exists, or else compare it."""
    try:
        directory.root.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            stream.write(content.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        hard_link(temporary, directory.manifest)
    except FileExistsError:
        check_directory(directory, content, "if_same" if resume == "never" else resume)
        if _is_damaged(directory, content):
            write_atomically(directory.manifest, content.to_json())
    except OSError as error:
        if directory.manifest.exists() and error.errno in STORAGE_ERRORS:
            raise  # resuming: a full disk, for example, stops the run
        raise UserError(f"output.dir={directory.root} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _is_damaged(directory: DatasetDir, content: Manifest) -> bool:
    """Return whether `dataset.json` cannot be parsed, contradicts itself, or has another plan than its job."""
    try:
        existing = directory.read_manifest()
    except FormatError:
        return True
    if is_earlier(existing, content) or extends(existing, content):
        return False
    same = (existing.fingerprint, existing.identity, existing.plan) == _identified(content)
    return not same or bool(manifest_problems(existing))


def _identified(content: Manifest) -> tuple[str | None, dict[str, Any], PlanTotals]:
    return content.fingerprint, json.loads(to_json(content.identity)), content.plan


def build(job: Job, plan: Plan, dtype: str, config: str | None = None) -> Manifest:
    """Build the manifest of a job whose weights are on this machine, sampled in `dtype` (resolved if it is `auto`).

    `config` is the model config of a single-file checkpoint if the job does not name one.
    """
    pretrained, config = job.backbone.pretrained, job.backbone.config or config
    source = f"backbone.config={config} of " if config else ""
    weights = require_local(
        weights_id(pretrained, job.backbone.revision, config), f"{source}backbone.pretrained={pretrained}"
    )
    loras = [require_local(lora_id(lora.weights), f"the LoRA {lora.weights}") for lora in job.backbone.loras]
    control, checker, clip = job.backbone.controlnet.weights, job.safety.checker, job.scores.clip
    control = control and require_local(controlnet_id(control), f"backbone.controlnet.weights={control}")
    files = ip_adapter_files(job.backbone.ip_adapter)
    style = files and require_local(ip_adapter_id(files), f"backbone.ip_adapter.weights={files.weights}")
    checker = checker and require_local(checker_id(checker), f"safety.checker={checker}")
    clip = clip and require_local(clip_id(clip), f"scores.clip={clip}")
    return manifest(job, plan, identity(job, plan, dtype, weights, loras, checker, clip, control, style))


def has_local_weights(job: Job, config: str | None = None) -> bool:
    """Return whether all weights that `build` needs are on this machine."""
    backbone = job.backbone
    ids = [weights_id(backbone.pretrained, backbone.revision, backbone.config or config)]
    ids += [controlnet_id(backbone.controlnet.weights)] if backbone.controlnet.weights else []
    files = ip_adapter_files(backbone.ip_adapter)
    ids += [ip_adapter_id(files)] if files else []
    ids += [checker_id(job.safety.checker)] if job.safety.checker else []
    ids += [clip_id(job.scores.clip)] if job.scores.clip else []
    return None not in ids + [lora_id(lora.weights) for lora in backbone.loras]
