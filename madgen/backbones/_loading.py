"""Load diffusers pipelines and fuse LoRAs into them; safetensors only, nothing is unpickled."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from madgen.backbones import BackboneSpec, Checkpoint, Lora
from madgen.backbones._lora import read_lora, set_unit_strength
from madgen.hub.model_configs import FILES, config_source, read_config
from madgen.hub.weights import lora_file, offline_hint, single_file
from madgen.utils.errors import UserError

B = TypeVar("B")
LORA_DOWN = re.compile(r"\.lora_A\.|[._]lora[._]down\.|\.lora_linear_layer\.down\.")  # one tensor per adapted layer


def load_backbone(
    build: Callable[[Any, BackboneSpec, torch.dtype, torch.device], B],
    describe: Callable[[str, str | None, str | None], BackboneSpec],
    pretrained: str,
    checkpoint: Checkpoint,
    **options: Any,
) -> B:
    """Load a pipeline and call `build` with it and with its spec; `options`: see `load_pipeline`."""
    revision, config = checkpoint.get("revision"), checkpoint.get("config")
    dtype, device = checkpoint.get("dtype", torch.float32), torch.device(checkpoint.get("device", "cpu"))
    spec = describe(pretrained, revision, config)
    pipeline = load_pipeline(
        pretrained,
        revision=revision,
        variant=checkpoint.get("variant"),
        config=config,
        loras=checkpoint.get("loras", ()),
        dtype=dtype,
        **options,
    )
    return build(pipeline, spec, dtype, device)


def load_pipeline(
    pretrained: str,
    *,
    revision: str | None,
    variant: str | None,
    config: str | None,
    loras: Sequence[Lora],
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """Load a folder, a hub id or a single `.safetensors` file; `options` are passed to the pipeline class."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    file = single_file(pretrained)
    common = {"revision": revision, "dtype": dtype, **options}
    try:
        if file is None:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                pretrained, variant=variant, use_safetensors=True, **common
            )
        else:
            _refuse_variant(variant, pretrained)
            where = config_source(pretrained, revision, config)
            name = read_config(where, revision, FILES[0], "backbone.config")["_class_name"]
            pipeline = getattr(diffusers, name).from_single_file(str(file), config=where, **common)
    except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError, SafetensorError) as error:
        reason = str(getattr(error, "message", error)).strip().splitlines()[0]
        raise UserError(f"cannot load backbone.pretrained={pretrained}: {reason}{offline_hint()}") from error
    _refuse_missing_weights(pipeline, pretrained)
    fuse_loras(pipeline, loras)
    return pipeline


def download(pretrained: str, revision: str | None, variant: str | None, config: str | None) -> list[Path]:
    """Download the files that `load_pipeline` reads; return their folders in the hub cache, none for local files."""
    import diffusers
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    where = config_source(pretrained, revision, config)
    if Path(where).is_dir():
        return []
    read_config(where, revision, FILES[0], "backbone.pretrained" if where == pretrained else "backbone.config")
    try:
        if single_file(pretrained) is None:
            options = {"revision": revision, "variant": variant, "use_safetensors": True}
            return [Path(diffusers.DiffusionPipeline.download(pretrained, **options))]
        # diffusers reads these files besides the weights.
        parts = [f"{folder}*.{suffix}" for folder in ("", "**/") for suffix in ("json", "txt", "model")]
        return [Path(snapshot_download(where, revision=revision, allow_patterns=parts))]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"cannot download {where}: {str(error).strip().splitlines()[0]}") from error


def _refuse_variant(variant: str | None, pretrained: str) -> None:
    if variant is not None:
        raise UserError(f"backbone.variant={variant} does not apply to the single file {pretrained}; set it to null")


def _models(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _refuse_missing_weights(pipeline: Any, pretrained: str) -> None:
    """Raise UserError for missing weights: diffusers leaves tensors without data that a single file lacks."""
    for name, model in _models(pipeline).items():
        missing = [tensor for tensor, value in model.named_parameters() if value.is_meta]
        if missing:
            raise UserError(f"backbone.pretrained={pretrained} lacks weights of its {name}: {missing[0]}")


def fuse_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add each LoRA, times its scale, to the weights; UserError if one cannot be applied in full."""
    if not loras:
        return
    names = [f"lora{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _add_lora(pipeline, name, lora)
    pipeline.set_adapters(names, adapter_weights=[lora.scale for lora in loras])
    adapted = [name for name, model in _models(pipeline).items() if getattr(model, "peft_config", None)]
    pipeline.fuse_lora(components=adapted, adapter_names=names)
    pipeline.unload_lora_weights()


def _add_lora(pipeline: Any, name: str, lora: Lora) -> None:
    from safetensors import SafetensorError, safe_open

    file = lora_file(lora.weights, download=True)
    assert file is not None
    try:
        state = read_lora(file, lora.weights, pipeline)
        with safe_open(file, framework="pt") as tensors:
            layers = sum(LORA_DOWN.search(tensor) is not None for tensor in tensors.keys())  # noqa: SIM118
        if state is not None:
            pipeline.load_lora_weights(state, adapter_name=name)
            set_unit_strength(pipeline, name)
        elif layers:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, SafetensorError) as error:
        raise UserError(f"cannot load the LoRA {lora.weights}: {str(error).strip().splitlines()[0]}") from error
    adapted = _adapted_layers(pipeline, name)
    if adapted == 0 or adapted != layers:
        raise UserError(
            f"the LoRA {lora.weights} does not match this backbone: it has {adapted} of the {layers} adapted layers"
        )


def _adapted_layers(pipeline: Any, name: str) -> int:
    modules = [module for model in _models(pipeline).values() for module in model.modules()]
    return sum(name in getattr(module, "lora_A", {}) for module in modules)
