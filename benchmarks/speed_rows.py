"""Rows of the speed benchmark, one function each; they return plain numbers for the log."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from speed_contenders import (
    GUIDANCE,
    PROMPT,
    Run,
    Timing,
    alternate,
    bare,
    madgen_run,
    panorama_pipeline,
    plain_attention,
    reference_folder,
    relative_error,
    released,
    sampler_of,
    timed,
)
from speed_jobs import batch, generate, parts
from speed_setup import SHAPES, Bench, Row, as_row, build_backbone, build_pipeline
from torch import Tensor

from madgen import PanoramaSampler
from madgen.config.schema import SamplingParams
from madgen.sampling.method import Method


def equal(bench: Bench) -> Row:
    """Compare results with the references before timing: float32 without autocast and TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    small = Bench(
        bench.device, bench.shape, "", 512, min(1024, bench.width), (), (0, 0), 1, 2, torch.float32, torch.float32
    )
    errors: Row = {}
    with torch.no_grad():
        shared = small.copied(torch.float32)
    small.backbone  # noqa: B018  changes the weights' memory layout, so it must follow the copy
    if reference_folder():
        reference = released(shared, small.height, small.width, True, exact=True)(2)
        errors["released, MAD in 2 of 2 steps"] = relative_error(
            small.madgen(1.0, cross_attention="always")(2), reference
        )
        reference = released(shared, small.height, small.width, False, exact=True)(2)
        ours = small.madgen(0.0, cross_attention="always")(2)
        errors["released, MAD in none"] = relative_error(ours, reference)
    theirs = panorama_pipeline(shared, small.height, small.width, 4)(2)
    errors["diffusers' panorama"] = relative_error(small.madgen(0.0, stride=8)(2), theirs)
    small.forget("pipeline", "backbone")
    gc.collect()
    torch.cuda.empty_cache()
    return {"relative_error": errors, "equal": all(error <= 1e-3 for error in errors.values())}


def eager(bench: Bench) -> Row:
    """Time madgen, the released code, the bare UNet and direct inference."""
    contenders = {
        "madgen, merged": bench.madgen(1.0),
        "madgen, not merged": bench.madgen(0.0),
    }
    if not (bench.device.type == "cpu" and bench.shape == "sd2"):  # takes minutes each
        contenders |= {
            "bare UNet": bare(bench.backbone, bench.views()),
            "direct": bench.madgen(0.0, layout="whole"),
        }
    if bench.released:
        contenders |= {
            "released, merged": released(bench.foreign, bench.height, bench.width, True),
            "released, not merged": released(bench.foreign, bench.height, bench.width, False),
        }
    return {"views": bench.views(), **bench.measure(contenders)}


def compiled(bench: Bench) -> Row:
    """Time `backbone.compile: true`; both graphs are compiled before."""
    backbone = bench.backbone
    if backbone.compiled is None:
        backbone.compile(bench.backend)
    made: Row = {}
    for name, merged in (("not merged", 0.0), ("merged", 1.0)):
        made[name] = timed(bench.madgen(merged, True), 1)[0]
    contenders = {
        "madgen compiled, merged": bench.madgen(1.0, True),
        "madgen compiled, not merged": bench.madgen(0.0, True),
        "madgen, merged": bench.madgen(1.0),
        "madgen, not merged": bench.madgen(0.0),
    }
    if bench.released:
        contenders |= {
            "released, merged": released(bench.foreign, bench.height, bench.width, True),
            "released, not merged": released(bench.foreign, bench.height, bench.width, False),
        }
    one, other = bench.madgen(1.0, True)(2), bench.madgen(1.0)(2)
    return {
        "seconds_of_first_step": made,
        "relative_error_to_eager": relative_error(one, other),
        **bench.measure(contenders),
    }


def compiled_decode(bench: Bench) -> Row:
    """Time the decoding of a panorama, compiled and eager."""
    backbone, sampler = bench.backbone, sampler_of(bench.backbone, 0)
    latents = bench.madgen(0.0)(1)
    if backbone.compiled is None:
        backbone.compile(bench.backend)
    graphs, found = backbone.compiled, {}
    for name, compiled in (("compiled", graphs), ("as it is", None)):
        backbone.compiled = compiled
        sampler.decode(latents)
        found[name] = [timed(lambda _: sampler.decode(latents), 1)[0] for _ in range(bench.rounds)]
    backbone.compiled = graphs
    return {"decode_seconds": found}


def compiled_bare(bench: Bench) -> Row:
    """Time the bare compiled UNet, the limit for compiled steps."""
    from madgen.backbones.acceleration.compilation import compiled as compile_unet

    if bench.backbone.compiled is None:
        bench.backbone.compile(bench.backend)
    limit = bare(bench.backbone, bench.views(), compile_unet(bench.backbone.unet, bench.backend))
    first = timed(limit, 1)[0]
    contenders = {
        "bare UNet compiled": limit,
        "madgen compiled, merged": bench.madgen(1.0, True),
        "madgen compiled, not merged": bench.madgen(0.0, True),
    }
    return {"seconds_of_first_step": first, **bench.measure(contenders)}


def multidiffusion(bench: Bench) -> Row:
    """Time MultiDiffusion and diffusers' pipeline at its best `view_batch_size`; a view every 8 cells."""
    views = bench.views(8)
    tried = sorted({1, min(8, views), min(16, views), views} if bench.device.type == "cpu" else {8, 16, views})
    theirs = {size: panorama_pipeline(bench.foreign_same, bench.height, bench.width, size) for size in tried}
    for run in theirs.values():
        run(1)
    best = min(tried, key=lambda size: timed(theirs[size], 2)[0])
    contenders = {"diffusers": theirs[best], "madgen, stride 8": bench.madgen(0.0, stride=8)}
    return {"views": views, "view_batch_size": best, **bench.measure(contenders)}


def multidiffusion_compiled(bench: Bench) -> Row:
    """Time MultiDiffusion with `backbone.compile: true`."""
    if bench.backbone.compiled is None:
        bench.backbone.compile(bench.backend)
    first = timed(bench.madgen(0.0, True, stride=8), 1)[0]
    best = bench.known.get("multidiffusion", {}).get("view_batch_size", 16)
    contenders = {
        "diffusers": panorama_pipeline(bench.foreign_same, bench.height, bench.width, best),
        "madgen compiled, stride 8": bench.madgen(0.0, True, stride=8),
        "madgen, stride 8": bench.madgen(0.0, stride=8),
    }
    return {"views": bench.views(8), "seconds_of_first_step": first, **bench.measure(contenders)}


def fast_run(bench: Bench, compiled: bool) -> tuple[str, int, Run]:
    """Return the file and the number of steps of the `fast` preset, and a run of a whole panorama.

    Only a fraction `bench.share` of the steps is run; all step settings are scaled alike.
    """
    from madgen import load_job

    folder = Path(__file__).resolve().parent.parent / "configs"
    path = next(path for path in (folder / "method/fast.yaml", folder / "method/mad-shifted.yaml") if path.exists())
    job = load_job([str(path)])
    mad, views, sampling = job.method.mad, job.method.views, job.sampling

    def own(step: int) -> int:
        return round(step * bench.share)

    overlap = None if views.overlap_from is None else own(views.overlap_from)
    method = replace(job.method, mad=replace(mad, steps=own(mad.steps)), views=replace(views, overlap_from=overlap))
    sampler = PanoramaSampler(bench.backbone, Method(method), SamplingParams.from_config(sampling))
    sampler.warns = False
    guided = None if sampling.guidance_steps is None else tuple(own(step) for step in sampling.guidance_steps)
    steps = own(sampling.num_inference_steps)

    def run(_: int) -> Any:
        graphs = bench.backbone.compiled
        bench.backbone.compiled = graphs if compiled else None
        try:
            return sampler.sample(
                [PROMPT], height=bench.height, width=bench.width, num_inference_steps=steps, guidance_scale=GUIDANCE,
                guidance_steps=guided, seeds=[7], output="latent",
            )  # fmt: skip
        finally:
            bench.backbone.compiled = graphs

    return path.name, steps, run


def fast(bench: Bench) -> Row:
    """Time whole panoramas of the fast preset."""
    name, steps, run = fast_run(bench, False)
    timings = alternate({"fast": run}, 1, min(3, bench.rounds), warm=False)
    found = {"fast": timings["fast"].seconds}
    return {"preset": name, "steps": steps, "share": bench.share, "seconds_a_panorama": found}


def fast_compiled(bench: Bench) -> Row:
    """Time the fast preset with `backbone.compile: true`, with a graph for every number of views."""
    if bench.backbone.compiled is None:
        bench.backbone.compile(bench.backend)
    name, steps, run = fast_run(bench, True)
    first = timed(run, 1)[0]
    timings = alternate({"fast": run}, 1, min(3, bench.rounds), warm=False)
    return {
        "preset": name,
        "steps": steps,
        "share": bench.share,
        "seconds_of_first_run": first,
        "seconds_a_panorama": {"fast compiled": timings["fast"].seconds},
    }


# Other widths, models and hardware features

STEPS_TIMES_WIDTH = 20 * 1024
"""Steps of a run times its width, constant so that encoding the prompt takes the same share of every run."""


def growth(bench: Bench) -> Row:
    """Measure time and memory of several widths, with and without merging."""
    found: Row = {"widths": {}}
    for width in bench.widths:
        contenders = {"merged": bench.madgen(1.0, width=width), "not merged": bench.madgen(0.0, width=width)}
        steps = max(2, STEPS_TIMES_WIDTH // width) if bench.device.type == "cuda" else 2
        row = as_row(alternate(contenders, steps, min(2, bench.rounds)))
        found["widths"][str(width)] = {"views": bench.views(width=width), **row}
    latents = bench.madgen(1.0, width=bench.widths[-1])(1)
    sampler = sampler_of(bench.backbone, 1)
    sampler.decode(latents)
    seconds, peak = timed(lambda _: sampler.decode(latents), 1)
    return {**found, "decode_widest": {"seconds": seconds, "peak_bytes": peak}}


def xl(bench: Bench) -> Row:
    """Time the SDXL shape with a view every 16 cells."""
    bench.forget("foreign", "foreign_same")
    shape = SHAPES[bench.xl_shape]
    pipeline = build_pipeline(shape, bench.dtype, bench.device)
    backbone = build_backbone(pipeline, shape, bench.dtype, bench.device)
    height, width = bench.xl_size
    views = sampler_of(backbone, 0, 16).geometry.build(height, width).at(0).count
    contenders = {
        "madgen, merged": madgen_run(backbone, height, width, 1.0, stride=16),
        "madgen, not merged": madgen_run(backbone, height, width, 0.0, stride=16),
        "bare UNet": bare(backbone, views),
    }
    return {"size": f"{height}x{width}", "views": views, **as_row(alternate(contenders, 1, min(3, bench.rounds)))}


def regions(bench: Bench) -> Row:
    """Time three regions with a shared negative prompt, evaluated once or for each region."""
    from madgen import Box, Region

    third, height = bench.width // 3, bench.height
    parts = [
        Region(Box(third * k, height // 2, third * (k + 1), height), text)
        for k, text in enumerate(("a hut", "a tree", "a lake"))
    ]
    shared = bench.madgen(0.3, regions=parts)

    def separate(steps: int) -> Any:
        with mock.patch("madgen.sampling.joint_sampler.row_view_ids", return_value=list(range(1 + len(parts)))):
            return shared(steps)

    found = bench.measure({"madgen, shared": shared, "madgen, a pass each": separate}, steps=10)
    return {"views": bench.views(), "relative_error": {"shared": relative_error(shared(5), separate(5))}, **found}


def layout(bench: Bench) -> Row:
    """Time channels-last and contiguous weights of the UNet."""
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    timings = {name: Timing() for name in formats}
    for _ in range(bench.rounds):
        for name, memory_format in formats.items():
            run = bare_of(bench, bench.foreign_same.unet.to(memory_format=memory_format))
            run(1)
            timings[name].seconds.append(timed(run, bench.steps)[0] / bench.steps)
    return as_row(timings)


def bare_of(bench: Bench, unet: Any) -> Run:
    """Return a UNet alone as a contender."""
    plain_attention(unet)
    return bare(bench.backbone, bench.views(), unet)


def graphs(bench: Bench) -> Row:
    """Time small passes with CUDA graphs and without at several widths, and compare the bytes."""
    backbone = bench.backbone
    captured = backbone.graphs

    def without_graphs(run: Run) -> Run:
        def eager_run(steps: int) -> Any:
            backbone.graphs = None
            try:
                return run(steps)
            finally:
                backbone.graphs = captured

        return eager_run

    found: Row = {"widths": {}, "same_bytes": same_bytes(bench, without_graphs)}
    for width in (512, *bench.widths[:2], bench.width):
        run = bench.madgen(0.5, width=width)
        row = as_row(alternate({"CUDA graphs": run, "kernel by kernel": without_graphs(run)}, 10, 2))
        found["widths"][str(width)] = {"views": bench.views(width=width), **row, "peak_bytes": {}}
    return found


def same_bytes(bench: Bench, without_graphs: Callable[[Run], Run]) -> bool:
    """Compare panoramas of several prompts in both layouts, also after the weights have moved."""
    width, same = bench.widths[0], True
    for layout in ("overlapping", "shifted"):
        sampler = sampler_of(bench.backbone, 3, layout=layout)
        sampler.warns = False

        def sample(steps: int, sampler: Any = sampler, seed: int = 0) -> Tensor:
            options = {"height": bench.height, "width": width, "num_inference_steps": steps, "output": "latent"}
            return sampler.sample([f"{PROMPT} {seed}"], seeds=[seed], guidance_scale=GUIDANCE, **options)

        for seed in range(3):
            run = partial(sample, seed=seed)
            same &= torch.equal(run(10), without_graphs(run)(10))
            if seed == 1:
                with bench.backbone.in_float32():
                    pass
    return same


ROWS: dict[str, tuple[Callable[[Bench], Row], float]] = {
    # with the time limit on a GPU in seconds
    "equal": (equal, 40),
    "eager": (eager, 60),
    "fast": (fast, 40),
    "multidiffusion": (multidiffusion, 60),
    "compiled": (compiled, 240),
    "compiled_decode": (compiled_decode, 60),
    "graphs": (graphs, 40),
    "batch": (batch, 40),
    "growth": (growth, 50),
    "generate": (generate, 60),
    "regions": (regions, 40),
    "parts": (parts, 20),
    "xl": (xl, 50),
    "layout": (layout, 20),
    "multidiffusion_compiled": (multidiffusion_compiled, 100),
    "compiled_bare": (compiled_bare, 100),
    "fast_compiled": (fast_compiled, 240),
}
