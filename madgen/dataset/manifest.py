"""`dataset.json`: what was asked, and the fingerprint that refuses another job in the same directory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import secrets
from typing import Any

from madgen.config import Job
from madgen.dataset.layout import DatasetDir, sync_directory, to_json
from madgen.errors import UserError
from madgen.plan.shards import Plan
from madgen.weights import lora_id, require_lora_id, require_weights_id, resolve_dtype, weights_id

VERSIONED = ("madgen", "torch", "diffusers", "transformers", "lightning", "webdataset", "pillow")


SAMPLING = ("loop", "num_inference_steps", "guidance_scale", "scheduler", "original_inference_steps", "decode")


def identity(job: Job, plan: Plan, dtype: str, weights: str, loras: list[str]) -> dict[str, Any]:
    """Everything that affects the bytes of the shards, and nothing that does not (devices, batch size, monitor)."""
    resolved = job.as_dict()
    return {
        "backbone": {
            "name": job.backbone.name,
            "weights": weights,
            "variant": job.backbone.variant,
            "dtype": dtype,
            "loras": [
                {"id": found, "scale": lora.scale} for found, lora in zip(loras, job.backbone.loras, strict=True)
            ],
        },
        "method": resolved["method"],
        "sampling": {name: resolved["sampling"][name] for name in SAMPLING},
        "name": job.name,
        "prompts": {
            "digest": plan.prompts_digest,
            "samples_per_prompt": plan.samples_per_prompt,
            "seed": plan.seed,
        },
        "output": {name: resolved["output"][name] for name in ("format", "quality", "samples_per_shard")},
    }


def fingerprint(identity: dict[str, Any]) -> str:
    """A short hash of `identity`."""
    return hashlib.blake2b(to_json(identity), digest_size=16).hexdigest()


def manifest(job: Job, plan: Plan, identity: dict[str, Any]) -> dict[str, Any]:
    """The content of `dataset.json`."""
    return {
        "madgen": 1,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "job": job.as_dict(),
        "plan": {
            "prompts": len(plan.prompts),
            "samples": plan.samples,
            "shards": plan.shard_count,
            "samples_per_shard": plan.samples_per_shard,
            "keys_sha256": plan.keys_digest,
        },
        "versions": {name: _version(name) for name in VERSIONED},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_directory(directory: DatasetDir, content: dict[str, Any] | None, resume: str) -> None:
    """Refuses a directory of another job, or one that is not ours; writes nothing.

    `content` is what `dataset.json` would hold; None: not yet known.
    """
    root = directory.root
    occupied = next((path for path in (root, *root.parents) if path.exists()), root)
    if not occupied.is_dir():
        raise UserError(f"output.dir={root}: {occupied} is a file; choose a directory")
    if directory.manifest.exists():
        existing = directory.read_manifest()
        if resume == "never":
            raise UserError(f"output.dir={root} holds a dataset already and output.resume=never; choose another")
        changed = [] if content is None else _changed(existing, content)
        if changed:
            raise UserError(
                f"output.dir={root} holds a dataset of another job ({'; '.join(changed)}); "
                "choose another output.dir, or remove this one"
            )
    elif root.is_dir() and any(not entry.name.startswith(".") for entry in os.scandir(root)):
        raise UserError(f"output.dir={root} is not empty and holds no madgen dataset; choose another")


PROMPT_KEYS = ("prompts.", "sampling.height", "sampling.width")


def _changed(existing: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """The keys that differ; what makes the prompts differ is named by the keys of the job, where those tell."""
    found = differences(existing.get("identity", {}), content["identity"])
    if not any(line.startswith("prompts.digest") for line in found):
        return found
    asked = [line for line in differences(existing["job"], content["job"]) if line.startswith(PROMPT_KEYS)]
    others = [line for line in found if not line.startswith("prompts.")]
    return [*others, *(asked or ["prompts.source: other prompts or masks now"])]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    found: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif _plain(before) != _plain(after):
            found.append(f"{prefix}{key}: {before} there, {after} here")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def create(directory: DatasetDir, content: dict[str, Any]) -> None:
    """Writes `dataset.json` unless it is there; of several workers at once, one writes and the others check."""
    temporary = directory.root / f".dataset.json.{secrets.token_hex(6)}"
    try:
        directory.root.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(to_json(content, indent=1))
    except OSError as error:
        raise UserError(f"output.dir={directory.root} cannot be written: {error.strerror}") from error
    try:
        os.link(temporary, directory.manifest)
    except FileExistsError:
        check_directory(directory, content, "if_same")
    finally:
        temporary.unlink()
    sync_directory(directory.root)
    directory.shards.mkdir(exist_ok=True)


def build(job: Job, plan: Plan, device_type: str) -> dict[str, Any]:
    """The manifest of a job whose weights are at hand, on a kind of device (`dtype: auto` depends on it)."""
    dtype = resolve_dtype(job.backbone.dtype, device_type)
    weights = require_weights_id(job.backbone.pretrained, job.backbone.revision, job.backbone.config)
    loras = [require_lora_id(lora.weights) for lora in job.backbone.loras]
    return manifest(job, plan, identity(job, plan, dtype, weights, loras))


def at_hand(job: Job) -> bool:
    """Whether all the weights that `build` asks for are on this machine."""
    backbone = job.backbone
    known = [weights_id(backbone.pretrained, backbone.revision, backbone.config)]
    return None not in known + [lora_id(lora.weights) for lora in backbone.loras]
