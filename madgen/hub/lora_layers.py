"""Names of a LoRA's tensors, and their sizes compared with a checkpoint's by file headers. Imports no framework."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from madgen.hub.adapters import lora_file
from madgen.hub.model_size import FLOATS, folder_tensors
from madgen.hub.safetensors_file import read_header
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

NAMES = (
    re.compile(r"(?P<layer>.+)\.lora_(?P<role>A|B|down|up)(?:\.default)?\.weight"),
    re.compile(r"(?P<layer>.+)\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.processor\.(?P<projection>to_[qkv]|to_out)_lora\.(?P<role>down|up)\.weight"),
)
"""Names of a LoRA's tensors: PEFT's and kohya's, diffusers', and those of diffusers' former attention processors."""
ROLES = {"A": "down", "B": "up"}
KOHYA = re.compile(r"(?:lora_(unet|te|te1|te2)|lycoris)_(.+)")
KOHYA_PARTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
"""Text encoders in the pipeline by their names in kohya's files."""
UNET_LAYER = re.compile(r"(down|up|mid|input|output|middle)_blocks?_")
NETWORKS = ("unet", "transformer")


class LoraTensor(NamedTuple):
    """One of the two tensors of an adapted layer."""

    part: str
    """Model in the pipeline."""
    layer: str
    """Name of the layer in the model; underscores may stand for dots."""
    is_up: bool
    shape: Sequence[int]
    is_exact: bool
    """Whether the layer's name is that of diffusers."""


def layer_and_role(key: str, names: Sequence[re.Pattern[str]] = NAMES) -> tuple[str, str] | None:
    """Return the layer that a tensor adapts, and its role, such as `down` or `up`; None for a name of another kind."""
    match = next(filter(None, (name.fullmatch(key) for name in names)), None)
    if match is None:
        return None
    layer, projection = match["layer"], match.groupdict().get("projection")
    if projection is not None:
        layer = f"{layer}.{projection}{'.0' * (projection == 'to_out')}"
    return layer, ROLES.get(match["role"], match["role"])


def check_lora(weights: str, files: ModelFiles) -> None:
    """Raise UserError if a LoRA does not exist, is no complete safetensors file, or does not fit a checkpoint.

    LoRAs and checkpoints that are still on the Hub, and single files, are checked when they are loaded.
    """
    file = lora_file(weights)
    if file is None:
        return
    header = read_header(file, f"the LoRA {weights}")
    parts = folder_tensors(files)
    if any(network in parts for network in NETWORKS):
        problem = next(_problems(header.tensors, parts), None)
        if problem is not None:
            raise UserError(f"cannot apply the LoRA {weights}: {problem}")


def size_problem(layer: str, is_up: bool, shape: Sequence[int], weight: Sequence[int]) -> str | None:
    """Describe a tensor whose features are not those of the layer's weight; None if they are."""
    side = 0 if is_up else 1
    if len(shape) < 2 or len(weight) < 2 or shape[side] == weight[side]:
        return None
    kind = "outputs" if is_up else "inputs"
    return f"it is for another model: {layer} has {weight[side]} {kind} here, and {shape[side]} in the LoRA"


def _problems(tensors: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Describe tensors that do not fit, of layers whose names in the checkpoint follow from those in the LoRA."""
    network = next(name for name in NETWORKS if name in parts)
    flat = {part: {_flat(name): (name, entry) for name, entry in content.items()} for part, content in parts.items()}
    for tensor in _lora_tensors(tensors, network):
        name, entry = flat.get(tensor.part, {}).get(_flat(f"{tensor.layer}.weight"), (None, None))
        if name is None or entry is None:
            is_of_unet = tensor.part == "transformer" and UNET_LAYER.match(tensor.layer)
            if tensor.part in NETWORKS and (tensor.part not in parts or tensor.is_exact or is_of_unet):
                yield f"it does not match this backbone: its {tensor.part} has no layer {tensor.layer}"
            continue
        layer = f"{tensor.part}.{name.removesuffix('.weight')}"
        if entry["dtype"] in FLOATS and (problem := size_problem(layer, tensor.is_up, tensor.shape, entry["shape"])):
            yield problem


def _lora_tensors(tensors: Mapping[str, Any], network: str) -> Iterator[LoraTensor]:
    """Yield the tensors of plain LoRAs; those of other kinds, such as LoHa, have other names."""
    mixed = {key.rpartition(".lora_mid")[0] for key in tensors if ".lora_mid" in key}
    for key in tensors:
        layer, role = layer_and_role(key) or (None, None)
        if layer is None or layer in mixed:
            continue
        part, name, exact = _located(layer, network)
        if part is not None:
            yield LoraTensor(part, name, role == "up", tensors[key]["shape"], exact)


def _located(layer: str, network: str) -> tuple[str | None, str, bool]:
    """Return the part and the layer that a name means, and whether its dots are kept; None for an unknown part."""
    if match := KOHYA.fullmatch(layer):
        return KOHYA_PARTS.get(match[1], network), match[2], False
    part, _, name = layer.partition(".")
    known = part in NETWORKS or part.startswith("text_encoder")
    return (part, name, True) if known else (None, layer, False)


def _flat(name: str) -> str:
    return name.removeprefix("text_model.").removeprefix("text_model_").replace(".", "_")
