"""Rows of the speed benchmark: whole jobs, and where the time goes."""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from speed_bench import PAPER_STEPS, TAU, Bench, Row
from speed_contenders import GUIDANCE, PROMPT, alternate, sampler_of, synchronize, timed
from speed_parts import shares

from madgen import PanoramaSampler


def generate(bench: Bench) -> Row:
    """The engine, with Lightning, encoder and writer, against a loop over `sampler.sample` with the same weights.

    From the start of the first batch to the end of the last one: a job ends once, by writing that batch.
    """
    import lightning

    from madgen import PanoramaModule, PromptDataModule, ShardWriter, load_job
    from madgen.generation.run import build_trainer, quieten

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
            from madgen.generation.robust_sampler import Attempts

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
    bench.backbone.compiled, graphs = None, bench.backbone.graphs
    bench.backbone.graphs = None  # the profiler does not see what a graph's kernels are of
    try:
        found: Row = {name: shares(bench.ours(merged)) for name, merged in (("merged", 1.0), ("not merged", 0.0))}
    finally:
        bench.backbone.graphs = graphs
    sampler = sampler_of(bench.backbone, 0)
    latents = bench.ours(0.0)(1)
    sampler.decode(latents)
    seconds, peak = timed(lambda _: sampler.decode(latents), 1)
    image = sampler.decode(latents)[0]
    from madgen.dataset.encoding import encode_image

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
    """Seconds a panorama of 1024 px by how many are sampled at once; `auto` is the most."""
    from madgen.config.schema import SamplingConfig
    from madgen.generation.batch_size import BatchSizes
    from madgen.types import Prompt

    width, steps = bench.widths[0], 10
    sampler = sampler_of(bench.backbone, round(steps * TAU / PAPER_STEPS))
    sampler.warns_of_cuts = False
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
