"""Fuse LoRAs into the weights of a pipeline. Alphas of the files are multiplied into the weights before.

diffusers assigns alphas by name, and a name that matches no module is ignored; files of kohya's scripts, in
which alpha and rank may differ between layers, would be applied at other strengths than they were trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madgen.backbones import Lora
from madgen.hub.weights import lora_file
from madgen.utils.errors import UserError

State = dict[str, Tensor]
UNSUPPORTED = (
    ("dora_scale", r"\.dora_scale$", "weight decomposition (DoRA) in kohya's layout"),
    ("hada_*", r"\.hada_", "LoHa factors"),
    ("lokr_*", r"\.lokr_", "LoKr factors"),
    ("lora_mid", r"\.lora_mid\.", "CP-decomposed convolutions"),
    ("diff", r"\.(diff|diff_b|w_norm|b_norm)$", "full weight differences"),
)
DOWN = re.compile(r"\.lora_A\.|[._]lora[._]down\.|\.lora_linear_layer\.down\.")  # one tensor per adapted layer
KOHYA = re.compile(r"(lora_(?:unet|te|te1|te2)_\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")
PEFT = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
TEXT_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}


def fuse_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add each LoRA, times its scale, to the weights; UserError if one cannot be applied in full."""
    if not loras:
        return
    names = [f"lora{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _add_lora(pipeline, name, lora)
    pipeline.set_adapters(names, adapter_weights=[lora.scale for lora in loras])
    adapted = [name for name, model in pipeline.components.items() if getattr(model, "peft_config", None)]
    pipeline.fuse_lora(components=adapted, adapter_names=names)
    pipeline.unload_lora_weights()


def _add_lora(pipeline: Any, name: str, lora: Lora) -> None:
    from safetensors import SafetensorError, safe_open

    file = lora_file(lora.weights, download=True)
    assert file is not None
    try:
        state = _read_lora(file, lora.weights, pipeline)
        with safe_open(file, framework="pt") as tensors:
            layers = sum(DOWN.search(tensor) is not None for tensor in tensors.keys())  # noqa: SIM118
        if state is not None:
            layers = layers if hasattr(pipeline, "unet") else sum(DOWN.search(key) is not None for key in state)
            pipeline.load_lora_weights(state, adapter_name=name)
            _set_unit_strength(pipeline, name)
        elif layers:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, SafetensorError) as error:
        raise UserError(f"cannot load the LoRA {lora.weights}: {str(error).strip().splitlines()[0]}") from error
    adapted = len(list(_adapted_layers(pipeline, name)))
    if adapted == 0 or adapted != layers:
        raise UserError(
            f"the LoRA {lora.weights} does not match this backbone: it has {adapted} of the {layers} adapted layers"
        )


def _adapted_layers(pipeline: Any, adapter: str) -> Iterator[Any]:
    for model in (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)):
        yield from (module for module in model.modules() if adapter in getattr(module, "lora_A", {}))


def _read_lora(file: Path, name: str, pipeline: Any) -> State | None:
    """Return the state dict to load into `pipeline`; None if diffusers reads the file as it is.

    `name` is the LoRA as the job names it. UserError if the file holds tensors that cannot be applied. May raise what
    safetensors raises.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    for label, pattern, meaning in UNSUPPORTED:
        if key := next((key for key in state if re.search(pattern, key)), None):
            raise UserError(f"the LoRA {name} is not supported: it has {meaning} ({label}) in {key}")
    if any(PEFT.fullmatch(key) for key in state):
        return _from_peft(file, name, state, pipeline)
    if any(key.startswith("lora_") for key in state):
        convert = _from_kohya if hasattr(pipeline, "unet") else _from_kohya_transformer
        return convert(name, state, pipeline)
    return None


def _by_layer(name: str, state: State, pattern: re.Pattern[str], complete: set[str]) -> dict[str, State]:
    """Group tensors by layer and part, which `pattern` captures. UserError for other tensors and incomplete layers."""
    layers: dict[str, State] = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise UserError(f"the LoRA {name} has a tensor that cannot be applied: {key}")
        layers.setdefault(match[1], {})[match[2]] = value
    for layer, parts in layers.items():
        if missing := complete - parts.keys():
            raise UserError(f"the LoRA {name} lacks {min(missing)} of {layer}")
    return layers


def _from_kohya(name: str, state: State, pipeline: Any) -> State:
    unet: State = {}
    loaded: State = {}
    for layer, parts in _by_layer(name, state, KOHYA, {"lora_down.weight", "lora_up.weight"}).items():
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        if "alpha" in parts:
            up = _times(up, float(parts["alpha"]) / down.shape[0])
        prefix, _, flat_name = layer.removeprefix("lora_").partition("_")
        if prefix == "unet":
            unet[f"{layer}.lora_down.weight"], unet[f"{layer}.lora_up.weight"] = down, up
        else:
            target = _text_module(name, pipeline, TEXT_ENCODERS[prefix], flat_name)
            loaded[f"{target}.lora_A.weight"], loaded[f"{target}.lora_B.weight"] = down, up
    if unet:  # diffusers also knows the block names of the original Stable Diffusion XL code
        loaded |= pipeline.lora_state_dict(unet, unet_config=pipeline.unet.config)[0]
    return loaded


def _from_kohya_transformer(name: str, state: State, pipeline: Any) -> State:
    """Let diffusers convert the names, and apply the alphas: layers that the file fuses are split."""
    unknown = f"the LoRA {name} has kohya's layout, which diffusers cannot convert for {type(pipeline).__name__}"
    try:
        loaded = pipeline.lora_state_dict(state)
    except AssertionError as error:
        raise UserError(f"{unknown}: its shapes are unknown") from error
    if left := next((key for key in loaded if key.startswith("lora_")), None):
        raise UserError(f"{unknown}: {left}")
    converted: State = loaded
    return converted


def _text_module(name: str, pipeline: Any, part: str, flat_name: str) -> str:
    """Return the name of a text encoder's layer from kohya's, which has underscores for dots."""
    encoder = getattr(pipeline, part, None)
    for layer, _ in encoder.named_modules() if encoder is not None else ():
        # Versions of transformers differ in whether names begin with `text_model`.
        if flat_name.removeprefix("text_model_") == layer.removeprefix("text_model.").replace(".", "_"):
            return f"{part}.{layer}"
    raise UserError(f"the LoRA {name} does not match this backbone: its {part} has no layer {flat_name}")


def _from_peft(file: Path, name: str, state: State, pipeline: Any) -> State:
    """Convert a PEFT adapter, which adapts one model; its alphas are in `adapter_config.json` beside it."""
    config = file.with_name("adapter_config.json")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        if content.get("use_dora"):
            raise UserError(f"the LoRA {name} is not supported: it has weight decomposition (DoRA) in PEFT's layout")
        alpha, rslora = float(content["lora_alpha"]), bool(content.get("use_rslora"))
        patterns = {str(key): float(value) for key, value in (content.get("alpha_pattern") or {}).items()}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the LoRA {name} is a PEFT adapter; cannot read lora_alpha of {config}: {error!r}") from error
    layers = _by_layer(name, state, PEFT, {"lora_A", "lora_B"})
    parts = [part for part in PARTS if getattr(pipeline, part, None) is not None]
    fits = [part for part in parts if layers.keys() <= {found for found, _ in getattr(pipeline, part).named_modules()}]
    if not fits:
        raise UserError(
            f"the LoRA {name} does not match this backbone: its layers, such as {next(iter(layers))}, are in none of "
            f"{', '.join(parts)}"
        )
    loaded: State = {}
    for layer, pair in layers.items():
        rank = pair["lora_A"].shape[0]
        own = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), alpha)
        loaded[f"{fits[0]}.{layer}.lora_A.weight"] = pair["lora_A"]
        loaded[f"{fits[0]}.{layer}.lora_B.weight"] = _times(pair["lora_B"], own / (rank**0.5 if rslora else rank))
    return loaded


def _times(weight: Tensor, factor: float) -> Tensor:
    """Scale in float32, where rounding does not change what the file says."""
    return weight if factor == 1 else weight.float() * factor


def _set_unit_strength(pipeline: Any, adapter: str) -> None:
    """Set alpha = rank in all layers of an adapter, so that only the job's scale is left."""
    for layer in _adapted_layers(pipeline, adapter):
        layer.lora_alpha[adapter] = layer.r[adapter] = layer.lora_A[adapter].weight.shape[0]
        layer.scaling[adapter] = 1.0
