"""Load diffusers pipelines, also with quantized weights; safetensors only, nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from madgen.hub.model_configs import FILES, config_source, read_config
from madgen.hub.model_size import check_variant, held_parts
from madgen.hub.weights import ModelFiles, loading, single_file
from madgen.utils.errors import UserError

TEXT_ENCODERS_AND_VAE = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
QUANTIZATION_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""The package that each value of `backbone.quantization` needs."""


def load_pipeline(
    files: ModelFiles, dtype: torch.dtype, single_file_parts: Mapping[str, tuple[str, ...]], **options: Any
) -> Any:
    """Load a folder, a hub id or a single `.safetensors` file; `options` are passed to the pipeline class.

    `single_file_parts`: models besides the network in a single file, with the beginnings of their tensor names. Those
    that a file with a transformer lacks are loaded from its `config`; a file with a UNet has all models.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    file = single_file(files.pretrained)
    check_variant(files)
    common = {"revision": files.revision, "dtype": dtype, **options}
    with loading("backbone.pretrained", files.pretrained, SingleFileComponentError):
        if file is None:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                files.pretrained, variant=files.variant, use_safetensors=True, **common
            )
        else:
            where = config_source(files)
            index = read_config(where, files.revision, FILES[0], "backbone.config")
            if "transformer" in index:
                pipeline = _with_parts_of(file, where, index, single_file_parts, common)
            else:
                pipeline = getattr(diffusers, index["_class_name"]).from_single_file(str(file), config=where, **common)
    _refuse_missing_weights(pipeline, files.pretrained)
    return pipeline


def _with_parts_of(
    file: Path,
    where: str,
    index: Mapping[str, Any],
    parts: Mapping[str, tuple[str, ...]],
    options: Mapping[str, Any],
) -> Any:
    """Load the transformer and other models of a single file, and the models that it lacks from `where`."""
    import diffusers

    held = held_parts(file, parts)
    present = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    absent = {name for name, value in options.items() if name in present and value is None}
    lacking = [part for part in TEXT_ENCODERS_AND_VAE if part in present - absent - held]
    try:
        rest = diffusers.DiffusionPipeline.from_pretrained(
            where, use_safetensors=True, **{**options, "transformer": None, **dict.fromkeys(held & present)}
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone.pretrained={file} has no {' and no '.join(lacking)}, which backbone.config={where} lacks too; "
            "set backbone.config to a complete pipeline of the same model family"
        ) from error
    if held:
        cls, given = getattr(diffusers, index["_class_name"]), {part: getattr(rest, part) for part in lacking}
        pipeline = cls.from_single_file(str(file), config=where, **given, **options)
        for part in held & set(TEXT_ENCODERS_AND_VAE[:-1]):
            getattr(pipeline, part).tie_weights()  # T5's embeddings, which diffusers leaves without data
        return pipeline
    cls, dtype = getattr(diffusers, index["transformer"][1]), options["dtype"]
    transformer = cls.from_single_file(str(file), config=where, subfolder="transformer", torch_dtype=dtype)
    rest.register_modules(transformer=transformer)
    return rest


def download(files: ModelFiles, single_file_parts: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """Download the files that `load_pipeline` reads; return their folders in the hub cache, none for local files."""
    import diffusers
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    pretrained, revision = files.pretrained, files.revision
    where = config_source(files)
    if Path(where).is_dir():
        return []
    key = "backbone.pretrained" if where == pretrained else "backbone.config"
    index = read_config(where, revision, FILES[0], key)
    try:
        if (file := single_file(pretrained)) is None:
            options = {"revision": revision, "variant": files.variant, "use_safetensors": True}
            return [Path(diffusers.DiffusionPipeline.download(pretrained, **options))]
        # diffusers reads these files besides the weights.
        parts = [f"{folder}*.{suffix}" for folder in ("", "**/") for suffix in ("json", "txt", "model")]
        if "transformer" in index:
            lacking = set(single_file_parts) - held_parts(file, single_file_parts)
            parts += [f"{part}/*.safetensors" for part in sorted(lacking)]
        return [Path(snapshot_download(where, revision=revision, allow_patterns=parts))]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"cannot download {where}: {str(error).strip().splitlines()[0]}") from error


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Return the networks of a pipeline by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _refuse_missing_weights(pipeline: Any, pretrained: str) -> None:
    """Raise UserError for missing weights: diffusers leaves tensors without data that a single file lacks."""
    for name, model in models_of(pipeline).items():
        missing = [tensor for tensor, value in model.named_parameters() if value.is_meta]
        if missing:
            raise UserError(f"backbone.pretrained={pretrained} lacks weights of its {name}: {missing[0]}")


def check_quantization(kind: str) -> None:
    """Raise UserError if the package that quantizes the weights is not installed."""
    package = QUANTIZATION_PACKAGES[kind]
    if find_spec(package) is None:
        raise UserError(
            f"backbone.quantization={kind} needs the package {package}: pip install 'madgen[quant]', or set it to null"
        )


def quantization_config(kind: str, part: str, dtype: torch.dtype) -> Any:
    """Return the argument `quantization_config` of `from_pretrained` for the network, `part` of the pipeline."""
    from diffusers import PipelineQuantizationConfig

    if kind == "nf4":
        from diffusers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from diffusers import TorchAoConfig
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping={part: config})
