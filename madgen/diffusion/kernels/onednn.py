"""Compute float32 matrix products and attention on CPUs by oneDNN, where PyTorch would use MKL and that is slower.

PyTorch takes oneDNN for convolutions, and MKL for all other products. On one thread of an AMD EPYC with AVX-512 a
layer's product by MKL ran at 90 to 112 GFLOP/s, by oneDNN at 150 to 250, and attention over 512 to 16384 tokens of 64
took 1.6 to 1.7 times as long as with oneDNN's products.

oneDNN keeps the kernels of the last 1024 shapes that it met, half a megabyte each, those of convolutions too: after six
widths of the demo's panoramas a process held 224 MB more than after one, with MKL's products 213.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SCORES = 2**19
"""Attention scores computed at once, for each thread: 2 MB, which stay in the caches."""
MIN_ROWS = 64
"""Smallest number of queries computed at once, because the keys are rearranged for each product."""
KEYS = range(512, 2**16 + 1)
"""Numbers of keys for which attention is faster than PyTorch's at all shapes; above them it is slower."""
MAX_THREADS = 2
"""Largest number of threads: 1.2 to 1.6 times as fast with two; more were not measured. oneDNN's threads share one
product, PyTorch's all heads."""


@cache
def is_faster() -> bool:
    """Return whether this is an AMD processor with AVX-512, and PyTorch's oneDNN agrees with MKL.

    Speed is not measured at run time, because the same machine must return the same last bits every time.
    """
    present = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    faster = present and wide and _vendor() == "AuthenticAMD" and _works()
    if faster:
        _register_operators()
    return faster


def is_faster_in_attention() -> bool:
    """Return `is_faster` for the current number of threads."""
    return torch.get_num_threads() <= MAX_THREADS and is_faster()


def takes(*tensors: Tensor) -> bool:
    """Return whether oneDNN supports these tensors: float32 on a CPU, without gradients."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors) and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


def attends(query_NHLD: Tensor, key_NHTD: Tensor, value_NHTD: Tensor) -> bool:
    """Return whether attention over these tensors is faster, given `is_faster_in_attention`."""
    return key_NHTD.shape[2] in KEYS and takes(query_NHLD, key_NHTD, value_NHTD)


def linear(input_ND: Tensor, weight_KD: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear`."""
    call = torch.ops.madgen.linear.default if torch.compiler.is_compiling() else _linear
    product: Tensor = call(input_ND, weight_KD, bias_K)
    return product


def attention(query_NHLD: Tensor, key_NHTD: Tensor, value_NHTD: Tensor, scale: float) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention`."""
    call = torch.ops.madgen.attention.default if torch.compiler.is_compiling() else _attention
    output_NLHD: Tensor = call(query_NHLD, key_NHTD, value_NHTD, scale)
    return output_NLHD.transpose(1, 2)


def _linear(input_ND: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None) -> torch.Tensor:
    """Multiply contiguous copies: oneDNN is many times slower on views of larger tensors."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        input_ND.contiguous(), weight_KD.contiguous(), bias_K, "none", [], ""
    )
    return product


def _attention(
    query_NHLD: torch.Tensor, key_NHTD: torch.Tensor, value_NHTD: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend, head by head, some queries at a time: [N, L, H, D]."""
    count, heads, length, _ = query_NHLD.shape
    rows = max(MIN_ROWS, SCORES * torch.get_num_threads() // key_NHTD.shape[2])
    output = query_NHLD.new_empty(count, length, heads, value_NHTD.shape[-1])
    for one in range(count):
        for head in range(heads):
            key, value = key_NHTD[one, head].contiguous(), value_NHTD[one, head].t().contiguous()
            query = query_NHLD[one, head] * scale
            for first in range(0, length, rows):
                scores = _linear(query[first : first + rows], key, None)
                torch.softmax(scores, -1, out=scores)
                output[one, first : first + rows, head] = _linear(scores, value, None)
    return output


@cache
def _register_operators() -> None:
    """Register `torch.ops.madgen`, which a compiler does not look into: it would unroll the heads.

    torch evaluates the annotations of the functions.
    """
    linear_op = torch.library.custom_op("madgen::linear", _linear, mutates_args=())
    attention_op = torch.library.custom_op("madgen::attention", _attention, mutates_args=())

    @linear_op.register_fake
    def _(input_ND: Tensor, weight_KD: Tensor, bias_K: Tensor | None) -> Tensor:
        return input_ND.new_empty(*input_ND.shape[:-1], len(weight_KD))

    @attention_op.register_fake
    def _(query_NHLD: Tensor, key_NHTD: Tensor, value_NHTD: Tensor, scale: float) -> Tensor:
        count, heads, length, _ = query_NHLD.shape
        return query_NHLD.new_empty(count, length, heads, value_NHTD.shape[-1])


def _vendor() -> str | None:
    """Return the processor's vendor as Linux names it; None if it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def _works() -> bool:
    """Return whether PyTorch's private operation computes linear layers in this version."""
    try:
        numbers = torch.linspace(-1, 1, 2 * 3 * 32, dtype=torch.float32, device="cpu").reshape(2, 3, 32)
        weight = torch.linspace(1, -2, 64 * 32, dtype=torch.float32, device="cpu").reshape(64, 32)
        with torch.no_grad():
            return all(
                torch.allclose(
                    _linear(given, weight, bias), torch.nn.functional.linear(given, weight, bias), rtol=1e-4, atol=1e-5
                )
                for given in (numbers, numbers[0], numbers[0, :1])
                for bias in (None, weight[:, 0].contiguous())
            )
    except Exception:  # of other versions of PyTorch
        return False
