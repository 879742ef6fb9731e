"""The rows of the speed benchmark: what is measured, one function a row. Each returns plain numbers for the log."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_bench import Bench, Row
from speed_contenders import (
    GUIDANCE,
    PROMPT,
    Run,
    alternate,
    bare,
    panorama_pipeline,
    reference_folder,
    relative_error,
    released,
    sampler_of,
    timed,
)
from speed_job_rows import batch, generate, parts
from speed_shape_rows import graphs, growth, layout, regions, xl

from madgen import PanoramaSampler
from madgen.backbones import Merging
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method


def equal(bench: Bench) -> Row:
    """Results checked before anything is timed: float32, no autocast, no TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    small = Bench(
        bench.device, bench.shape, "", 512, min(1024, bench.width), (), (0, 0), 1, 2, torch.float32, torch.float32
    )
    errors: Row = {}
    with torch.no_grad():
        shared = small.copied(torch.float32)
    small.backbone  # noqa: B018  moves the weights into our layout after they were copied
    if reference_folder():
        reference = released(shared, small.height, small.width, True, exact=True)(2)
        errors["released, MAD in 2 of 2 steps"] = relative_error(
            small.ours(1.0, cross_attention="always")(2), reference
        )
        reference = released(shared, small.height, small.width, False, exact=True)(2)
        ours = small.ours(0.0, cross_attention="always")(2)
        errors["released, MAD in none"] = relative_error(ours, reference)
    theirs = panorama_pipeline(shared, small.height, small.width, 4)(2)
    errors["diffusers' panorama"] = relative_error(small.ours(0.0, stride=8)(2), theirs)
    small.forget("pipeline", "backbone")
    gc.collect()
    torch.cuda.empty_cache()
    return {"relative_error": errors, "equal": all(error <= 1e-3 for error in errors.values())}


def eager(bench: Bench) -> Row:
    """madgen as it is against the released code, the bare UNet and direct inference."""
    contenders = {
        "madgen, merged": bench.ours(1.0),
        "madgen, not merged": bench.ours(0.0),
    }
    if not (bench.device.type == "cpu" and bench.shape == "sd2"):  # minutes each
        contenders |= {
            "bare UNet": bare(bench.backbone, bench.views()),
            "direct": bench.ours(0.0, layout="whole"),
        }
    if bench.released:
        contenders |= {
            "released, merged": released(bench.foreign, bench.height, bench.width, True),
            "released, not merged": released(bench.foreign, bench.height, bench.width, False),
        }
    return {"views": bench.views(), **bench.measure(contenders)}


def compiled(bench: Bench) -> Row:
    """`backbone.compile: true`: two graphs, made before the clock starts."""
    backbone = bench.backbone
    if backbone.compiled is None:
        backbone.compile(bench.backend)
    made: Row = {}
    for name, merged in (("not merged", 0.0), ("merged", 1.0)):
        made[name] = timed(bench.ours(merged, True), 1)[0]
    contenders = {
        "madgen compiled, merged": bench.ours(1.0, True),
        "madgen compiled, not merged": bench.ours(0.0, True),
        "madgen, merged": bench.ours(1.0),
        "madgen, not merged": bench.ours(0.0),
    }
    if bench.released:
        contenders |= {
            "released, merged": released(bench.foreign, bench.height, bench.width, True),
            "released, not merged": released(bench.foreign, bench.height, bench.width, False),
        }
    one, other = bench.ours(1.0, True)(2), bench.ours(1.0)(2)
    return {
        "seconds_of_first_step": made,
        "relative_error_to_eager": relative_error(one, other),
        **bench.measure(contenders),
    }


def compiled_decode(bench: Bench) -> Row:
    """A panorama's decoding, in compiled graphs and as it is."""
    backbone, sampler = bench.backbone, sampler_of(bench.backbone, 0)
    latents = bench.ours(0.0)(1)
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
    """The limit for compiled steps: the bare UNet, compiled alike."""
    from madgen.backbones.acceleration.compilation import compiled as compile_unet

    if bench.backbone.compiled is None:
        bench.backbone.compile(bench.backend)
    limit = bare(bench.backbone, bench.views(), compile_unet(bench.backbone.unet, bench.backend))
    first = timed(limit, 1)[0]
    contenders = {
        "bare UNet compiled": limit,
        "madgen compiled, merged": bench.ours(1.0, True),
        "madgen compiled, not merged": bench.ours(0.0, True),
    }
    return {"seconds_of_first_step": first, **bench.measure(contenders)}


def multidiffusion(bench: Bench) -> Row:
    """Against diffusers' pipeline: a view every 8 cells, at the `view_batch_size` that is best for it."""
    views = bench.views(8)
    tried = sorted({1, min(8, views), min(16, views), views} if bench.device.type == "cpu" else {8, 16, views})
    theirs = {size: panorama_pipeline(bench.foreign_same, bench.height, bench.width, size) for size in tried}
    for run in theirs.values():
        run(1)
    best = min(tried, key=lambda size: timed(theirs[size], 2)[0])
    contenders = {"diffusers": theirs[best], "madgen, stride 8": bench.ours(0.0, stride=8)}
    return {"views": views, "view_batch_size": best, **bench.measure(contenders)}


def multidiffusion_compiled(bench: Bench) -> Row:
    """As `multidiffusion`, with `backbone.compile: true`."""
    if bench.backbone.compiled is None:
        bench.backbone.compile(bench.backend)
    first = timed(bench.ours(0.0, True, stride=8), 1)[0]
    best = bench.known.get("multidiffusion", {}).get("view_batch_size", 16)
    contenders = {
        "diffusers": panorama_pipeline(bench.foreign_same, bench.height, bench.width, best),
        "madgen compiled, stride 8": bench.ours(0.0, True, stride=8),
        "madgen, stride 8": bench.ours(0.0, stride=8),
    }
    return {"views": bench.views(8), "seconds_of_first_step": first, **bench.measure(contenders)}


def fast_run(bench: Bench, compiled: bool) -> tuple[str, int, Run]:
    """The `fast` preset if there is one, else MAD with shifted views: its file, its steps, and a whole panorama of it.

    `bench.share` of its steps are taken, all its numbers of steps in proportion.
    """
    from madgen import load_job

    folder = Path(__file__).resolve().parent.parent / "configs"
    path = next(path for path in (folder / "method/fast.yaml", folder / "method/mad-shifted.yaml") if path.exists())
    job = load_job([str(path)])
    mad, views, sampling = job.method.mad, job.method.views, job.sampling

    def own(step: int) -> int:
        return round(step * bench.share)

    merging = Merging(own(mad.steps), tuple(mad.blocks), mad.cross_attention)
    overlap = None if views.overlap_from is None else own(views.overlap_from)
    geometry = Geometry(bench.backbone.spec, views.layout, views.size, views.stride, merging, overlap)
    sampler = PanoramaSampler(bench.backbone, geometry, Method(merging), sampling.scheduler)
    sampler.warns_of_cuts = False
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
    """Whole panoramas of the fast preset."""
    name, steps, run = fast_run(bench, False)
    timings = alternate({"fast": run}, 1, min(3, bench.rounds), warm=False)
    found = {"fast": timings["fast"].seconds}
    return {"preset": name, "steps": steps, "share": bench.share, "seconds_a_panorama": found}


def fast_compiled(bench: Bench) -> Row:
    """The fast preset with `backbone.compile: true`: graphs for every number of views."""
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


ROWS: dict[str, tuple[Callable[[Bench], Row], float]] = {
    # seconds that a row may take on a GPU at most; what runs over is stopped and said so
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
