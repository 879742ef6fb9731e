"""The rows of the speed benchmark: what is measured, one function a row. Each returns plain numbers for the log."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_contenders import (
    GUIDANCE,
    PROMPT,
    Run,
    Timing,
    alternate,
    bare,
    madgen,
    panorama_pipeline,
    plain_attention,
    reference_folder,
    relative_error,
    released,
    sampler_of,
    synchronize,
    timed,
)
from speed_models import SHAPES, build_backbone, build_pipeline
from speed_parts import shares

from madgen import PanoramaSampler
from madgen.backbones import Merging
from madgen.geometry import Geometry
from madgen.sampler import Method

Row = dict[str, Any]
PAPER_STEPS, TAU = 50, 15


@dataclass
class Bench:
    """Shapes and sizes of a run, and the models of it; they are built when first asked for."""

    device: torch.device
    shape: str
    xl_shape: str
    height: int
    width: int
    widths: tuple[int, ...]
    xl_size: tuple[int, int]
    rounds: int
    steps: int
    dtype: torch.dtype
    foreign_dtype: torch.dtype
    """Of the released code: float16 on a GPU, its own choice under autocast; it knows no bfloat16."""
    backend: str = "inductor"
    panoramas: int = 4
    share: float = 1.0
    """Of the fast preset's steps."""
    known: dict[str, Row] = field(default_factory=dict)

    @cached_property
    def pipeline(self) -> Any:
        """Ours."""
        return build_pipeline(SHAPES[self.shape], self.dtype, self.device)

    @cached_property
    def backbone(self) -> Any:
        """On the weights of `pipeline`."""
        if self.shape == "demo":
            return PanoramaSampler.from_pretrained("demo", dtype="float32", device=self.device).backbone
        return build_backbone(self.pipeline, SHAPES[self.shape], self.dtype, self.device)

    def copied(self, dtype: torch.dtype) -> Any:
        """A pipeline with the same weights in modules of their own, in the layout that diffusers leaves them in."""
        ours = self.pipeline
        parts = dict(ours.components)
        for name in ("unet", "vae", "text_encoder"):
            parts[name] = copy.deepcopy(parts[name]).to(dtype=dtype, memory_format=torch.contiguous_format).eval()
            parts[name].requires_grad_(False)
        plain_attention(parts["unet"])
        parts["scheduler"] = copy.deepcopy(ours.scheduler)
        return type(ours)(**parts, requires_safety_checker=False)

    @cached_property
    def foreign(self) -> Any:
        """For the released code."""
        return self.copied(self.foreign_dtype)

    @cached_property
    def foreign_same(self) -> Any:
        """For diffusers: our dtype."""
        return self.foreign if self.foreign_dtype == self.dtype else self.copied(self.dtype)

    def forget(self, *names: str) -> None:
        """Frees models."""
        for name in names:
            self.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def released(self) -> bool:
        """Whether the released code is at hand and can run this: its views are of 64 cells."""
        return reference_folder() is not None and self.shape != "demo"

    def views(self, stride: int | None = None, width: int | None = None) -> int:
        """Of a panorama."""
        return sampler_of(self.backbone, 0, stride).geometry.build(self.height, width or self.width).at(0).count

    def ours(self, merged: float, compiled: bool = False, **method: Any) -> Run:
        """madgen at this size."""
        width = method.pop("width", self.width)
        return madgen(self.backbone, self.height, width, merged, compiled, **method)

    def measure(self, contenders: dict[str, Run], steps: int | None = None, rounds: int | None = None) -> Row:
        """Alternates them."""
        return as_row(alternate(contenders, steps or self.steps, rounds or self.rounds))


def as_row(timings: dict[str, Timing]) -> Row:
    """For the log."""
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return {
        "seconds_a_step": seconds,
        "median": {name: timing.median for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak for name, timing in timings.items() if timing.peak},
    }


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


def compiled_bare(bench: Bench) -> Row:
    """The limit for compiled steps: the bare UNet, compiled alike."""
    from madgen.backbones._compile import compiled as compile_unet

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


def growth(bench: Bench) -> Row:
    """Time and memory of widths, merged and not."""
    found: Row = {"widths": {}}
    for width in bench.widths:
        contenders = {"merged": bench.ours(1.0, width=width), "not merged": bench.ours(0.0, width=width)}
        row = as_row(alternate(contenders, 2 if width < 8192 else 1, min(2, bench.rounds)))
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


def generate(bench: Bench) -> Row:
    """The engine, with Lightning, encoder and writer, against a loop over `sampler.sample` with the same weights.

    From the start of the first batch to the end of the last one: a job ends once, by writing that batch.
    """
    import lightning

    from madgen import PanoramaModule, PromptDataModule, ShardWriter, load_job
    from madgen.engine.run import build_trainer, quieten

    quieten()
    steps = 10 if bench.device.type == "cuda" or bench.shape == "demo" else 2  # of tiny ones a step takes seconds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bench.backbone.compiled = None
        model = "demo"
        if bench.shape != "demo":
            model = str(root / "model")
            bench.pipeline.save_pretrained(model)
        (root / "prompts.txt").write_text("".join(f"{kind} over the sea\n" for kind in range(bench.panoramas)))
        dtype = str(bench.dtype).removeprefix("torch.")
        job_of = lambda out: load_job(  # noqa: E731
            [],
            [
                f"backbone.pretrained={model}", f"backbone.dtype={dtype}", f"output.dir={root / out}",
                f"prompts.source={root / 'prompts.txt'}", f"sampling.height={bench.height}",
                f"sampling.width={bench.width}", f"sampling.num_inference_steps={steps}",
                f"method.mad.steps={round(steps * TAU / PAPER_STEPS)}", "monitor.wandb.mode=disabled",
                "trainer.devices=1", f"trainer.accelerator={'gpu' if bench.device.type == 'cuda' else 'cpu'}",
                "output.samples_per_shard=2",
            ],
        )  # fmt: skip
        sampler = PanoramaSampler.from_job(job_of("warm"), bench.device)

        class Clock(lightning.Callback):
            def on_predict_batch_start(self, *_: Any) -> None:
                self.started = getattr(self, "started", None) or time.perf_counter()

            def on_predict_batch_end(self, *_: Any) -> None:  # after the writer's, which waits where it is behind
                self.ended = time.perf_counter()

        def engine(out: str) -> float:
            job, clock = job_of(out), Clock()
            module = PanoramaModule(job)
            module.sampler = sampler
            from madgen.engine.attempts import Attempts

            module.attempts = Attempts(sampler, job.sampling)
            trainer = build_trainer(job.trainer, [ShardWriter(job), clock])
            trainer.predict(module, datamodule=PromptDataModule(job), return_predictions=False)
            return clock.ended - clock.started

        def loop() -> float:
            synchronize()
            started = time.perf_counter()
            for seed in range(bench.panoramas):
                sampler.sample(
                    [f"{seed} over the sea"], height=bench.height, width=bench.width, num_inference_steps=steps,
                    seeds=[seed],
                )  # fmt: skip
            return time.perf_counter() - started

        sampler.warns_of_cuts = False
        sampler.sample(["x"], height=bench.height, width=bench.width, num_inference_steps=2, seeds=[0])
        measured: dict[str, list[float]] = {"generate": [], "sampler": []}
        for round_ in range(min(2, bench.rounds)):
            measured["sampler"].append(loop() / bench.panoramas)
            measured["generate"].append(engine(f"out{round_}") / bench.panoramas)
        sidecar = json.loads(next((root / "out0" / "shards").glob("*.json")).read_text())
    return {
        "steps": steps,
        "panoramas": bench.panoramas,
        "seconds_a_panorama": measured,
        "median": {name: float(np.median(values)) for name, values in measured.items()},
        "sidecar_seconds": sidecar["seconds"],
    }


def parts(bench: Bench) -> Row:
    """Where the time of a step goes, by torch's profiler, and what comes after sampling."""
    bench.backbone.compiled = None
    found: Row = {name: shares(bench.ours(merged)) for name, merged in (("merged", 1.0), ("not merged", 0.0))}
    sampler = sampler_of(bench.backbone, 0)
    latents = bench.ours(0.0)(1)
    sampler.decode(latents)
    seconds, peak = timed(lambda _: sampler.decode(latents), 1)
    image = sampler.decode(latents)[0]
    from madgen.dataset.encode import encode_image

    started = time.perf_counter()
    data = encode_image(image, "png", 95)
    encoded = time.perf_counter() - started
    with tempfile.NamedTemporaryFile() as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        written = time.perf_counter() - started
    after = {"decode": seconds, "encode png": encoded, "write": written}
    return {**found, "after_sampling_seconds": after, "decode_peak_bytes": peak}


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


ROWS: dict[str, tuple[Callable[[Bench], Row], float]] = {
    # seconds that a row may take on a GPU at most; what runs over is stopped and said so
    "equal": (equal, 40),
    "eager": (eager, 60),
    "compiled": (compiled, 130),
    "fast": (fast, 40),
    "multidiffusion": (multidiffusion, 40),
    "growth": (growth, 50),
    "generate": (generate, 60),
    "parts": (parts, 20),
    "xl": (xl, 50),
    "layout": (layout, 20),
    "multidiffusion_compiled": (multidiffusion_compiled, 100),
    "compiled_bare": (compiled_bare, 100),
    "fast_compiled": (fast_compiled, 240),
}
