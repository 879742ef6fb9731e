"""Fuse LoRAs into the weights of a pipeline: W + scale * alpha / rank * up @ down, for every layer of the file.

Files of all layouts are converted to one: tensors by part and layer, with alpha / rank multiplied into `up`. diffusers
assigns alphas by name and ignores names that match no module, so that files of kohya's scripts, in which alpha and
rank may differ between layers, would be applied at other strengths than they were trained with. The layers of files
that have more than LoRA's tensors are adapted by `_lycoris`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from madgen.backbones import Lora, _lycoris, quiet_model_libraries
from madgen.backbones._loading import models_of
from madgen.hub.adapters import lora_file
from madgen.hub.lora_layers import KOHYA, KOHYA_PARTS, NAMES, layer_and_role, size_problem
from madgen.hub.safetensors_file import read_header
from madgen.hub.weights import LOADING_FAILURES
from madgen.utils.errors import UserError

State: TypeAlias = "dict[str, torch.Tensor]"
UNSUPPORTED = (
    ("bias", r"\.lora_B\.bias$|\.lora_up\.bias$|\.lora\.up\.bias$", "biases"),
    ("embedding", r"lora_embedding_[AB]|^bundle_emb\.|^string_to_param", "embeddings"),
    ("oft_*", r"\.(oft_|oft_blocks|boft_)", "orthogonal factors (OFT)"),
)
KEYS = (
    *NAMES,
    re.compile(r"(?P<layer>.+)\.processor\.(?P<projection>to_[qkv]|to_out)_lora\.(?P<role>alpha)"),
    re.compile(r"(?P<layer>.+)\.(?P<role>alpha)"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<role>mid)\.weight"),
    re.compile(rf"(?P<layer>.+)\.(?P<role>{'|'.join(sorted(_lycoris.ROLES - {'mid'}))})"),
)
"""Names of tensors, also of alphas and of LyCORIS."""
DOWN = re.compile(r"\.lora_A\.|[._]lora[._]down\.|\.lora_linear_layer\.down\.")  # one tensor per adapted layer
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
METADATA = "lora_adapter_metadata"  # JSON of PEFT's config, with the part as a prefix; written by diffusers

LONGEST_REASON = 300
"""Characters of a library's message."""


@dataclass
class Layer:
    """The tensors of one adapted layer, by role."""

    tensors: State = field(default_factory=dict)
    alpha: float | None = None

    @property
    def is_plain(self) -> bool:
        """Return whether it is LoRA's: `up` and `down`."""
        return self.tensors.keys() == {"down", "up"}


@dataclass(frozen=True)
class Strengths:
    """Alphas of layers for which the file has no tensor, from a PEFT config."""

    alpha: float | None = None
    """None: the rank."""
    patterns: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    rank: float | None = None
    """Rank of layers whose factors have none: two whole matrices of LoKr."""
    ranks: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Strengths:
        """Read the keys of PEFT's `LoraConfig`."""
        if config.get("use_dora"):
            raise UserError("it has weight decomposition (DoRA) in PEFT's layout, which is not supported")
        alphas, ranks = (
            {str(key): float(value) for key, value in (config.get(name) or {}).items()}
            for name in ("alpha_pattern", "rank_pattern")
        )
        alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
        return cls(
            None if alpha is None else float(alpha),
            alphas,
            bool(config.get("use_rslora")),
            None if rank is None else float(rank),
            ranks,
        )

    def factor(self, layer: str, rank: float | None) -> float:
        """Return alpha / rank of a layer, or alpha / sqrt(rank) for rank-stabilised LoRAs."""
        alpha = _of_pattern(self.patterns, layer, self.alpha)
        rank = _of_pattern(self.ranks, layer, self.rank) if rank is None else rank
        return 1.0 if alpha is None or rank is None else alpha / (rank**0.5 if self.rslora else rank)


def _of_pattern(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    """Return the value of the first pattern that matches a layer, as PEFT does."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), default)


def fuse_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add each LoRA, times its scale, to the weights; UserError if one cannot be applied in full."""
    for lora in loras:
        file = lora_file(lora.weights, download=True)
        assert file is not None
        metadata = read_header(file, f"the LoRA {lora.weights}").metadata
        try:
            with quiet_model_libraries(logging.CRITICAL):
                _fuse(pipeline, lora.scale, file, metadata)
        except UserError as error:
            raise UserError(f"cannot apply the LoRA {lora.weights}: {error}") from error
        except LOADING_FAILURES as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
            raise UserError(f"cannot apply the LoRA {lora.weights}; is it for another model? {reason}") from error


def _fuse(pipeline: Any, scale: float, file: Path, metadata: Mapping[str, str]) -> None:
    state = _read(file)
    if any((found := layer_and_role(key, KEYS)) and found[1] in _lycoris.ROLES for key in state):
        kohya = next((key for key in state if key.startswith("lora_")), None)
        if kohya is not None and _denoiser(pipeline) == "transformer":
            raise UserError(f"it has LyCORIS' tensors under kohya's names, which are known for UNets only: {kohya}")
        _adapt_layers(pipeline, _resolved(pipeline, file, state, metadata), scale)
        return
    loaded = _loadable(pipeline, file, state, metadata)
    layers = sum(DOWN.search(key) is not None for key in (state if loaded is None else loaded))
    name = "lora"
    if loaded is None:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
    else:
        pipeline.load_lora_weights(loaded, adapter_name=name)
        _set_unit_strength(pipeline, name)
    adapted = len(list(_adapted_layers(pipeline, name)))
    if adapted == 0 or adapted != layers:
        raise UserError(f"this backbone has {adapted} of the {layers} adapted layers")
    pipeline.set_adapters([name], adapter_weights=[scale])
    parts = [part for part, model in pipeline.components.items() if getattr(model, "peft_config", None)]
    pipeline.fuse_lora(components=parts, adapter_names=[name])
    pipeline.unload_lora_weights()


def _adapt_layers(pipeline: Any, layers: Iterable[tuple[str, str, Layer, float]], scale: float) -> None:
    """Adapt layers of LyCORIS' kinds, one after the other."""
    for part, module, layer, factor in layers:
        try:
            _lycoris.adapt_layer(getattr(pipeline, part).get_submodule(module), layer.tensors, factor, scale)
        except UserError as error:
            raise UserError(f"{part}.{module}: {error}") from error
        except RuntimeError as error:
            raise UserError(f"the tensors of {part}.{module} do not fit together: {error}") from error


def _adapted_layers(pipeline: Any, adapter: str) -> Iterator[Any]:
    for model in models_of(pipeline).values():
        yield from (module for module in model.modules() if adapter in getattr(module, "lora_A", {}))


def _set_unit_strength(pipeline: Any, adapter: str) -> None:
    """Set alpha = rank in all layers of an adapter, so that only the job's scale is left."""
    for layer in _adapted_layers(pipeline, adapter):
        layer.lora_alpha[adapter] = layer.r[adapter] = layer.lora_A[adapter].weight.shape[0]
        layer.scaling[adapter] = 1.0


def _read(file: Path) -> State:
    """Return the tensors of a file. UserError if some are of a kind that is not supported."""
    from safetensors.torch import load_file

    state: State = load_file(file)
    for label, pattern, meaning in UNSUPPORTED:
        if key := next((key for key in state if re.search(pattern, key)), None):
            raise UserError(f"it has {meaning} ({label}) in {key}, which is not supported")
    return state


def _loadable(pipeline: Any, file: Path, state: State, metadata: Mapping[str, str]) -> State | None:
    """Return tensors whose strength is 1; None if diffusers reads the file as it is, which is counted afterwards."""
    if any("lora_magnitude_vector" in key for key in state):  # DoRA in PEFT's layout
        return None
    if getattr(pipeline, "unet", None) is not None:
        return _converted(pipeline, file, state, metadata)
    if any(key.startswith("lora_") for key in state):
        return _from_kohya_transformer(state, pipeline)
    known = all(layer_and_role(key, KEYS) and key.partition(".")[0] in ("base_model", *PARTS) for key in state)
    return _converted(pipeline, file, state, metadata) if known else None


def _from_kohya_transformer(state: State, pipeline: Any) -> State:
    """Let diffusers convert the names, and apply the alphas: layers that the file fuses are split."""
    unknown = f"it has kohya's layout, which diffusers cannot convert for {type(pipeline).__name__}"
    try:
        loaded: State = pipeline.lora_state_dict(state)
    except AssertionError as error:
        raise UserError(f"{unknown}: its shapes are unknown") from error
    if left := next((key for key in loaded if key.startswith("lora_")), None):
        raise UserError(f"{unknown}: {left}")
    return loaded


def _converted(pipeline: Any, file: Path, state: State, metadata: Mapping[str, str]) -> State:
    """Return the tensors under diffusers' names, alpha / rank multiplied into `up`; UserError if one is left over."""
    loaded: State = {}
    for part, module, layer, factor in _resolved(pipeline, file, state, metadata):
        weight = getattr(getattr(pipeline, part).get_submodule(module), "weight", None)
        if weight is not None:
            _check_size(f"{part}.{module}", layer, weight)
        loaded[f"{part}.{module}.lora_A.weight"] = layer.tensors["down"]
        loaded[f"{part}.{module}.lora_B.weight"] = _times(layer.tensors["up"], factor)
    return loaded


def _check_size(name: str, layer: Layer, weight: torch.Tensor) -> None:
    """Raise UserError for tensors whose features are not those of a layer's weight."""
    for role in ("down", "up"):
        if problem := size_problem(name, role == "up", layer.tensors[role].shape, weight.shape):
            raise UserError(problem)


def _resolved(
    pipeline: Any, file: Path, state: State, metadata: Mapping[str, str]
) -> list[tuple[str, str, Layer, float]]:
    """Return the part, the module, the tensors and alpha / rank of each layer; UserError if a tensor is left over."""
    layers = _by_layer(state)
    strengths = _strengths(file, layers, metadata)
    resolved: dict[tuple[str, str], tuple[Layer, float]] = {}
    for name, (part, module) in _targets(pipeline, layers).items():
        if (part, module) in resolved:
            raise UserError(f"it has {part}.{module} twice, also as {name}")
        layer = layers[name]
        rank = _lycoris.rank_of(layer.tensors)
        if layer.alpha is None:
            factor = strengths.get(part, strengths.get("", Strengths())).factor(module, rank)
        else:
            factor = 1.0 if rank is None else layer.alpha / rank
        resolved[part, module] = layer, factor
    return [(*target, *adapted) for target, adapted in resolved.items()]


def _times(weight: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale in float32, where rounding does not change what the file says."""
    return weight if factor == 1 else weight.float() * factor


def _by_layer(state: State) -> dict[str, Layer]:
    """Group tensors by layer. UserError for unknown names, incomplete layers and values that are not finite."""
    layers: dict[str, Layer] = {}
    unknown = []
    for key, value in state.items():
        name, role = layer_and_role(key, KEYS) or (None, "")
        if name is None:
            unknown.append(key)
            continue
        if not bool(value.isfinite().all()):
            raise UserError(f"{key} has values that are not finite")
        layer = layers.setdefault(name, Layer())
        if role == "alpha":
            if value.numel() != 1:
                raise UserError(f"{key} must be one number, got the shape {list(value.shape)}")
            layer.alpha = float(value)
        else:
            layer.tensors[role] = value
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(f"it has tensors of an unknown kind: {', '.join(unknown[:3])}{more}")
    for name, layer in layers.items():
        _check_complete(name, layer)
    if not layers:
        raise UserError("it has no layers")
    return layers


def _check_complete(name: str, layer: Layer) -> None:
    """Raise UserError for a layer that lacks a tensor, or has one that does not belong to its others."""
    tensors = layer.tensors
    if tensors.keys() <= {"down", "up"} and not layer.is_plain:
        raise UserError(f"it lacks the {'up' if 'down' in tensors else 'down'} tensor of {name}")
    if frozenset(tensors) not in _lycoris.COMPLETE:
        raise UserError(f"its tensors of {name} are incomplete, or of two kinds: {', '.join(sorted(tensors))}")
    if layer.is_plain and tensors["down"].shape[0] != tensors["up"].shape[1]:
        raise UserError(f"{name} has ranks {tensors['down'].shape[0]} and {tensors['up'].shape[1]} in its two tensors")


def _strengths(file: Path, layers: Mapping[str, Layer], metadata: Mapping[str, str]) -> dict[str, Strengths]:
    """Return the strengths of each part from the metadata of diffusers, or of all parts from PEFT's config file."""
    config = file.with_name("adapter_config.json")
    is_peft = any(name.startswith("base_model.model.") for name in layers)
    source = config if is_peft else METADATA
    try:
        if is_peft:
            content = json.loads(config.read_text(encoding="utf-8"))
            if content.get("lora_alpha", content.get("alpha")) is None:
                raise UserError("it has no lora_alpha")
            return {"": Strengths.of(content)}
        packed: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(metadata.get(METADATA, "{}")).items():
            part, dot, name = key.partition(".")
            packed.setdefault(part if dot else "", {})[name if dot else key] = value
        return {part: Strengths.of(values) for part, values in packed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"cannot read its strengths from {source}: {error}") from error


def _targets(pipeline: Any, layers: Mapping[str, Layer]) -> dict[str, tuple[str, str]]:
    """Return the part and the module of each layer. UserError for layers that the pipeline does not have."""
    modules = {
        part: dict(model.named_modules()) for part in PARTS if (model := getattr(pipeline, part, None)) is not None
    }
    bare = {  # without their part, as PEFT does
        layer: layer.removeprefix("base_model.model.")
        for layer in layers
        if not KOHYA.fullmatch(layer) and layer.partition(".")[0] not in PARTS
    }
    kohya = {  # whose names have underscores for dots
        part: {name.removeprefix("text_model.").replace(".", "_"): name for name in known}
        for part, known in modules.items()
    }
    of_bare = _fitting_part(bare, layers, modules) if bare else ""
    resolved: dict[str, tuple[str, str]] = {}
    for layer in layers:
        if match := KOHYA.fullmatch(layer):
            part, name = KOHYA_PARTS.get(match[1], _denoiser(pipeline)), match[2]
            module = kohya.get(part, {}).get(name.removeprefix("text_model_"))
            if module is None and part == "unet":
                module = _original_unet_name(pipeline, layer)
        else:
            part, _, name = (of_bare, "", bare[layer]) if layer in bare else layer.partition(".")
            module = _existing(name, modules.get(part, {}))
        if module is None:
            raise UserError(f"it does not match this backbone: its {part} has no layer {name}")
        resolved[layer] = part, module
    return resolved


def _existing(name: str, modules: Mapping[str, Any]) -> str | None:
    """Return a module's name. Versions of transformers differ in whether names begin with `text_model`."""
    candidates = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return next((candidate for candidate in candidates if candidate in modules), None)


def _fitting_part(bare: Mapping[str, str], layers: Mapping[str, Layer], modules: Mapping[str, Any]) -> str:
    """Return the part whose modules have the names and the sizes of all layers."""
    for part, known in modules.items():
        found = {layer: _existing(name, known) for layer, name in bare.items()}
        if all(module is not None and _fits(layers[layer], known[module]) for layer, module in found.items()):
            return part
    raise UserError(
        f"it does not match this backbone: its layers, such as {next(iter(bare.values()))}, are in none of "
        f"{', '.join(modules)}"
    )


def _fits(layer: Layer, module: Any) -> bool:
    """Return whether the inputs of a module have the size of a LoRA's, or its weight that of another change."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return False
    if not layer.is_plain:
        return bool(_lycoris.change_of(layer.tensors).numel() == weight.numel())
    down = layer.tensors["down"]
    return bool(weight.ndim >= 2 and down.ndim >= 2 and down.shape[1] == weight.shape[1])


def _denoiser(pipeline: Any) -> str:
    return "transformer" if getattr(pipeline, "unet", None) is None else "unet"


def _original_unet_name(pipeline: Any, layer: str) -> str | None:
    """Return the module of a layer under the original code's block names, which diffusers knows; None for others."""
    probe = {f"{layer}.lora_down.weight": torch.zeros(1, 1), f"{layer}.lora_up.weight": torch.zeros(1, 1)}
    converted, _ = pipeline.lora_state_dict(probe, unet_config=pipeline.unet.config)
    return next((found[0].removeprefix("unet.") for key in converted if (found := layer_and_role(key, KEYS))), None)
