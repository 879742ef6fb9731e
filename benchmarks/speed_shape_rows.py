"""Rows of the speed benchmark: other widths and models, and what the hardware is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from speed_bench import Bench, Row, as_row
from speed_contenders import (
    GUIDANCE,
    PROMPT,
    Run,
    Timing,
    alternate,
    bare,
    madgen,
    plain_attention,
    relative_error,
    sampler_of,
    timed,
)
from speed_models import SHAPES, build_backbone, build_pipeline
from torch import Tensor

PROMPTS = ("a hut", "a tree", "a lake")
"""Of regions."""
STEPS_OF_ALL_WIDTHS = 20 * 1024
"""Steps of a run, times its width: prompts are encoded once a run, which few steps of a narrow panorama would hide."""


def growth(bench: Bench) -> Row:
    """Time and memory of widths, merged and not."""
    found: Row = {"widths": {}}
    for width in bench.widths:
        contenders = {"merged": bench.ours(1.0, width=width), "not merged": bench.ours(0.0, width=width)}
        steps = max(2, STEPS_OF_ALL_WIDTHS // width) if bench.device.type == "cuda" else 2
        row = as_row(alternate(contenders, steps, min(2, bench.rounds)))
        found["widths"][str(width)] = {"views": bench.views(width=width), **row}
    latents = bench.ours(1.0, width=bench.widths[-1])(1)
    sampler = sampler_of(bench.backbone, 1)
    sampler.decode(latents)
    seconds, peak = timed(lambda _: sampler.decode(latents), 1)
    return {**found, "decode_widest": {"seconds": seconds, "peak_bytes": peak}}


def xl(bench: Bench) -> Row:
    """SDXL: a view every 16 cells, as released."""
    bench.forget("foreign", "foreign_same")
    shape = SHAPES[bench.xl_shape]
    pipeline = build_pipeline(shape, bench.dtype, bench.device)
    backbone = build_backbone(pipeline, shape, bench.dtype, bench.device)
    height, width = bench.xl_size
    views = sampler_of(backbone, 0, 16).geometry.build(height, width).at(0).count
    contenders = {
        "madgen, merged": madgen(backbone, height, width, 1.0, stride=16),
        "madgen, not merged": madgen(backbone, height, width, 0.0, stride=16),
        "bare UNet": bare(backbone, views),
    }
    return {"size": f"{height}x{width}", "views": views, **as_row(alternate(contenders, 1, min(3, bench.rounds)))}


def regions(bench: Bench) -> Row:
    """Three regions over a background: their negative prompt, the same for all, in one pass or in one for each."""
    from madgen import Box, Region

    third, height = bench.width // 3, bench.height
    parts = [Region(Box(third * k, height // 2, third * (k + 1), height), text) for k, text in enumerate(PROMPTS)]
    shared = bench.ours(0.3, regions=parts)

    def apart(steps: int) -> Any:
        with mock.patch("madgen.sampling.sampler.seen", return_value=list(range(1 + len(parts)))):
            return shared(steps)

    found = bench.measure({"madgen, shared": shared, "madgen, a pass each": apart}, steps=10)
    return {"views": bench.views(), "relative_error": {"shared": relative_error(shared(5), apart(5))}, **found}


def layout(bench: Bench) -> Row:
    """Convolutions' weights with channels last against the contiguous ones, as madgen keeps them."""
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    timings = {name: Timing() for name in formats}
    for _ in range(bench.rounds):
        for name, memory_format in formats.items():
            run = bare_of(bench, bench.foreign_same.unet.to(memory_format=memory_format))
            run(1)
            timings[name].seconds.append(timed(run, bench.steps)[0] / bench.steps)
    return as_row(timings)


def bare_of(bench: Bench, unet: Any) -> Run:
    """The UNet alone."""
    plain_attention(unet)
    return bare(bench.backbone, bench.views(), unet)


def graphs(bench: Bench) -> Row:
    """CUDA graphs of small passes against launches one by one: seconds a step of several widths, and their bytes."""
    backbone = bench.backbone
    made = backbone.graphs

    def launched(run: Run) -> Run:
        def one_by_one(steps: int) -> Any:
            backbone.graphs = None
            try:
                return run(steps)
            finally:
                backbone.graphs = made

        return one_by_one

    found: Row = {"widths": {}, "same_bytes": same_bytes(bench, launched)}
    for width in (512, *bench.widths[:2], bench.width):
        run = bench.ours(0.5, width=width)
        row = as_row(alternate({"CUDA graphs": run, "kernel by kernel": launched(run)}, 10, 2))
        found["widths"][str(width)] = {"views": bench.views(width=width), **row, "peak_bytes": {}}
    return found


def same_bytes(bench: Bench, launched: Callable[[Run], Run]) -> bool:
    """Of panoramas of several prompts, one after the other, in both layouts; and after weights have moved."""
    width, same = bench.widths[0], True
    for layout in ("overlapping", "shifted"):
        sampler = sampler_of(bench.backbone, 3, layout=layout)
        sampler.warns_of_cuts = False

        def sample(steps: int, sampler: Any = sampler, seed: int = 0) -> Tensor:
            options = {"height": bench.height, "width": width, "num_inference_steps": steps, "output": "latent"}
            return sampler.sample([f"{PROMPT} {seed}"], seeds=[seed], guidance_scale=GUIDANCE, **options)

        for seed in range(3):
            run = partial(sample, seed=seed)
            same &= torch.equal(run(10), launched(run)(10))
            if seed == 1:
                with bench.backbone.in_float32():
                    pass
    return same
