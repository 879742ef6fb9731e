"""Rows of the speed benchmark that time whole jobs and their parts."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback
from speed_contenders import GUIDANCE, PROMPT, Run, alternate, sampler_of, synchronize, timed
from speed_setup import PAPER_STEPS, TAU, Bench, Row
from torch.profiler import ProfilerActivity, profile

from madgen import Job, PanoramaModule, PanoramaSampler, PromptDataModule, ShardWriter, load_job
from madgen.config.schema import SamplingConfig
from madgen.dataset.encoding import encode_image
from madgen.generation.batch_size import BatchSizes
from madgen.generation.quiet import quieten
from madgen.generation.robust_sampler import RobustSampler
from madgen.generation.run import build_trainer
from madgen.types import Prompt

MADGEN_KERNELS = ("split", "merge")
KINDS = {  # by substrings of operators' names, first match; oneDNN's attention products count as linear layers
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention", "softmax"),
    "convolutions": ("conv",),
    "linear layers": ("addmm", "::mm", "::bmm", "linear"),
    "normalisation": ("group_norm", "layer_norm"),
    "merge and split": ("index_select", "addcmul", "add_", *MADGEN_KERNELS),
    "activations": ("silu", "gelu", "::mul"),
}


def shares(run: Run) -> dict[str, float]:
    """Return the percentage of the device's busy time in one step, by kind of operator."""
    run(1)
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run(1)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if not event.key.startswith(("aten::", "mkldnn::")) and event.key not in MADGEN_KERNELS:
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "the rest")
        spent[kind] += own
    total = sum(spent.values()) or 1.0
    return {kind: 100 * value / total for kind, value in sorted(spent.items(), key=lambda item: -item[1])}


class Clock(Callback):
    """Time from the start of the first batch to the end of the last one."""

    started: float | None = None
    seconds = 0.0

    def on_predict_batch_start(self, *_: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_predict_batch_end(self, *_: Any) -> None:  # called after the writer's, which may wait
        assert self.started is not None
        self.seconds = time.perf_counter() - self.started


def generate(bench: Bench) -> Row:
    """Time a job with Lightning, encoder and writer, and a loop over `sampler.sample` with the same weights."""
    quieten()
    steps = 10 if bench.device.type == "cuda" or bench.shape == "demo" else 2  # a step of `tiny` takes seconds on a CPU
    measured: dict[str, list[float]] = {"generate": [], "sampler": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bench.backbone.compiled = None
        if bench.shape != "demo":
            bench.pipeline.save_pretrained(root / "model")
        prompts = "".join(f"{kind} over the sea\n" for kind in range(bench.panoramas))
        (root / "prompts.txt").write_text(prompts, encoding="utf-8")
        sampler = PanoramaSampler.from_job(_job(bench, root, steps, "warm"), bench.device)
        sampler.warns = False
        sampler.sample(["x"], height=bench.height, width=bench.width, num_inference_steps=2, seeds=[0])
        for number in range(min(2, bench.rounds)):
            measured["sampler"].append(_seconds_of_a_loop(bench, sampler, steps) / bench.panoramas)
            job = _job(bench, root, steps, f"out{number}")
            measured["generate"].append(_seconds_of_a_job(job, sampler) / bench.panoramas)
        sidecar = json.loads(next((root / "out0" / "shards").glob("*.json")).read_text(encoding="utf-8"))
    return {
        "steps": steps,
        "panoramas": bench.panoramas,
        "seconds_a_panorama": measured,
        "median": {name: float(np.median(values)) for name, values in measured.items()},
        "sidecar_seconds": sidecar["seconds"],
    }


def _job(bench: Bench, root: Path, steps: int, out: str) -> Job:
    return load_job(
        [],
        [
            f"backbone.pretrained={'demo' if bench.shape == 'demo' else root / 'model'}",
            f"backbone.dtype={str(bench.dtype).removeprefix('torch.')}", f"output.dir={root / out}",
            f"prompts.source={root / 'prompts.txt'}", f"sampling.height={bench.height}",
            f"sampling.width={bench.width}", f"sampling.num_inference_steps={steps}",
            f"method.mad.steps={round(steps * TAU / PAPER_STEPS)}", "monitor.wandb.mode=disabled",
            "trainer.devices=1", f"trainer.accelerator={'gpu' if bench.device.type == 'cuda' else 'cpu'}",
            "output.samples_per_shard=2",
        ],
    )  # fmt: skip


def _seconds_of_a_job(job: Job, sampler: PanoramaSampler) -> float:
    module, clock = PanoramaModule(job), Clock()
    module.attempts = RobustSampler(sampler, job.sampling)
    trainer = build_trainer(job.trainer, [ShardWriter(job), clock], job.output_dir)
    trainer.predict(module, datamodule=PromptDataModule(job), return_predictions=False)
    return clock.seconds


def _seconds_of_a_loop(bench: Bench, sampler: PanoramaSampler, steps: int) -> float:
    size = {"height": bench.height, "width": bench.width, "num_inference_steps": steps}
    synchronize()
    started = time.perf_counter()
    for seed in range(bench.panoramas):
        sampler.sample([f"{seed} over the sea"], seeds=[seed], **size)
    return time.perf_counter() - started


def parts(bench: Bench) -> Row:
    """Profile the steps, and time decoding, encoding and writing."""
    bench.backbone.compiled, graphs = None, bench.backbone.graphs
    bench.backbone.graphs = None  # the profiler does not attribute a graph's kernels
    try:
        found: Row = {name: shares(bench.madgen(merged)) for name, merged in (("merged", 1.0), ("not merged", 0.0))}
    finally:
        bench.backbone.graphs = graphs
    sampler = sampler_of(bench.backbone, 0)
    latents = bench.madgen(0.0)(1)
    sampler.decode(latents)
    seconds, peak = timed(lambda _: sampler.decode(latents), 1)
    image = sampler.decode(latents)[0]
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


def batch(bench: Bench) -> Row:
    """Time 1024 px panoramas at several batch sizes, up to `auto`."""
    width, steps = bench.widths[0], 10
    sampler = sampler_of(bench.backbone, round(steps * TAU / PAPER_STEPS))
    sampler.warns = False
    sizes = BatchSizes(SamplingConfig(batch_size="auto"), sampler.geometry, bench.device.type)
    auto = sizes(Prompt("0", PROMPT, "", bench.height, width))

    def sample(count: int, _: int) -> Any:
        return sampler.sample(
            [PROMPT] * count, height=bench.height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE,
            seeds=list(range(count)), output="latent",
        )  # fmt: skip

    counts = {f"{count} at once": count for count in sorted({1, 2, 4, auto})}
    timings = alternate({name: partial(sample, n) for name, n in counts.items()}, counts, min(2, bench.rounds))
    return {
        "size": f"{bench.height}x{width}",
        "steps": steps,
        "auto": auto,
        "seconds_a_panorama": {name: timing.seconds for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak for name, timing in timings.items() if timing.peak},
    }
