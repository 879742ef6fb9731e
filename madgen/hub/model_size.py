"""Count the parameters of a checkpoint from the headers of its safetensors files. Imports no framework."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.hub.safetensors_file import read_header
from madgen.hub.weights import ModelFiles, local_folder, single_file
from madgen.utils.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
KEPT_IN_FLOAT32 = "DenseReluDense.wo.weight"
"""End of the names of T5's parameters that transformers does not load in float16."""
FILE_NAME = re.compile(r"[^.]+?(?:\.([\w-]+?))?(-\d+-of-\d+)?")
"""Name of a file of weights, without its suffix: its variant, and its number among the parts of a model."""
VAE = ("first_stage_model.", "vae.")
"""Beginnings of the names of the VAE's tensors in a single file."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one model."""

    total: int
    linear: int = 0
    """Weights of linear layers, which quantization compresses."""
    rows: int = 0
    """Output features of the linear layers; each has a scale if it is quantized."""
    float32: int = 0
    """Parameters that are loaded in float32 in place of float16."""


def count_parts(
    files: ModelFiles, network: str, single_file_parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Parameters]:
    """Count the parameters of the models of a checkpoint, by folder; none for models that are not on this machine.

    `network`: the folder of the denoising network. `single_file_parts`: the other models in a single file, with the
    beginnings of their tensor names; those that a file lacks are counted in the folder of its `config`.
    """
    file = single_file(files.pretrained)
    if file is not None:
        others = {} if files.config is None else _folder_parts(files.config, files.revision, None)
        return others | _single_file_parts(file, network, single_file_parts)
    return _folder_parts(files.pretrained, files.revision, files.variant)


def held_parts(file: Path, parts: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return which models a single file has besides the denoising network."""
    names = _tensors([file])
    return {part for part, starts in parts.items() if any(name.startswith(starts) for name in names)}


def _folder_parts(pretrained: str, revision: str | None, variant: str | None) -> dict[str, Parameters]:
    tensors = folder_tensors(ModelFiles(pretrained, revision, variant=variant))
    return {name: _counted(content) for name, content in tensors.items()}


def folder_tensors(files: ModelFiles) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return dtype and shape of the tensors of each model of a folder; none for models that are not on this machine."""
    folder = local_folder(files.pretrained, files.revision)
    if folder is None:
        return {}
    parts = {path.name: _weight_files(path, files.variant) for path in folder.iterdir() if path.is_dir()}
    return {name: _tensors(chosen) for name, chosen in parts.items() if chosen}


def check_variant(files: ModelFiles) -> None:
    """Raise UserError for a variant that a single file cannot have, or of which a folder has no weights."""
    if files.variant is None:
        return
    name = f"backbone.variant={files.variant}"
    if single_file(files.pretrained) is not None:
        raise UserError(f"{name} does not apply to the single file {files.pretrained}; set it to null")
    folder = local_folder(files.pretrained, files.revision)
    if folder is None:
        return
    variants = {match[1] for path in folder.glob("*/*.safetensors") if (match := FILE_NAME.fullmatch(path.stem))}
    if files.variant not in variants:
        others = sorted(filter(None, variants))
        fix = f"it has {', '.join(others)}" if others else "set it to null"
        raise UserError(f"{name}: {files.pretrained} has no weights of this variant; {fix}")


def count_file(file: Path) -> Parameters:
    """Count the parameters in one file, or in the files of a folder."""
    return _counted(_tensors(_weight_files(file, None) if file.is_dir() else [file]))


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a model that diffusers loads: those of the variant if there are any, otherwise those of none.

    A model is one file or has numbered parts.
    """
    named = {path: FILE_NAME.fullmatch(path.stem) for path in folder.glob("*.safetensors")}
    own = [path for path, match in named.items() if match and match[1] == variant]
    plain = own or [path for path, match in named.items() if match and match[1] is None]
    numbered = [path for path in plain if named[path][2]]  # type: ignore[index]
    return sorted(numbered or plain)


def _tensors(files: Iterable[Path]) -> dict[str, Mapping[str, Any]]:
    return {name: entry for file in files for name, entry in read_header(file, str(file)).tensors.items()}


def _single_file_parts(file: Path, network: str, others: Mapping[str, tuple[str, ...]]) -> dict[str, Parameters]:
    parts: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entry in _tensors([file]).items():
        part = next((part for part, starts in others.items() if name.startswith(starts)), network)
        parts.setdefault(part, {})[name] = entry
    return {part: _counted(tensors) for part, tensors in parts.items()}


def _counted(tensors: Mapping[str, Mapping[str, Any]]) -> Parameters:
    total = linear = rows = wide = 0
    for name, entry in tensors.items():
        if entry["dtype"] not in FLOATS:  # positions of tokens, which are no parameters
            continue
        count = math.prod(entry["shape"])
        total += count
        if len(entry["shape"]) == 2 and name.endswith(".weight"):
            linear, rows = linear + count, rows + entry["shape"][0]
        wide += count * name.endswith(KEPT_IN_FLOAT32)
    return Parameters(total, linear, rows, wide)
