"""Shares of a step's time by kind of work, from torch's profiler: time on the device of each operator itself."""

from __future__ import annotations

from collections import defaultdict

import torch
from speed_contenders import Run
from torch.profiler import ProfilerActivity, profile

OWN_KERNELS = ("split", "merge")
KINDS = {  # the first kind that an operator's name contains; oneDNN's products in attention are of linear layers
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention", "softmax"),
    "convolutions": ("conv",),
    "linear layers": ("addmm", "::mm", "::bmm", "linear"),
    "normalisation": ("group_norm", "layer_norm"),
    "merge and split": ("index_select", "addcmul", "add_", *OWN_KERNELS),
    "activations": ("silu", "gelu", "::mul"),
}


def shares(run: Run) -> dict[str, float]:
    """Percent of the device's busy time in one step, by kind."""
    run(1)
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run(1)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if not event.key.startswith(("aten::", "mkldnn::")) and event.key not in OWN_KERNELS:
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "the rest")
        spent[kind] += own
    total = sum(spent.values()) or 1.0
    return {kind: 100 * value / total for kind, value in sorted(spent.items(), key=lambda item: -item[1])}
