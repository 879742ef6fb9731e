"""Quantized weights of the denoising network, by diffusers' `PipelineQuantizationConfig`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from madgen.utils.errors import UserError

if TYPE_CHECKING:
    import torch

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""The package that each value of `backbone.quantization` needs."""


def check_quantization(kind: str) -> None:
    """Raise UserError if the package that quantizes the weights is not installed."""
    package = PACKAGES[kind]
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
