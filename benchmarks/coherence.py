"""Measure the coherence of joint diffusion on a demo backbone: `python benchmarks/coherence.py OUT`.

Samples the same prompts and seeds in every setting of `coherence_settings.py`, scores the panoramas
(`coherence_scores.py`), and writes OUT/scores.jsonl (the cache, one line per panorama), OUT/report.md and
OUT/figure.png. An interrupted study is resumed by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import coherence_fidelity as fidelity
import coherence_scores as scores
import numpy as np
from coherence_report import write_report
from coherence_settings import GUIDANCE, PROMPTS, Setting, new_sampler, settings, unet_passes, view_evaluations
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from madgen import PanoramaSampler
from madgen.diffusion.views import shifts
from madgen.hub.weights import require_local, weights_id

FEATURES = "features.txt"
"""The crops' features beside the cache, too large for the repository."""
VIEW, STRIDE = 16, 4  # of the demo backbone, in latent cells


@dataclass(frozen=True)
class Study:
    """Options that all panoramas of a study share."""

    pretrained: str
    weights: str
    steps: int

    @property
    def name(self) -> str:
        """Backbone and weights, for the report."""
        return f"{Path(self.pretrained).name}, weights `{self.weights}`"

    def key(self, setting: Setting, prompt: str, seed: int) -> str:
        """Return the cache key of a panorama: a digest of everything that its scores depend on."""
        content = [setting.pixels(self.steps), self.steps, prompt, seed, self.weights, GUIDANCE, scores.VERSION]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()

    def borders(self) -> tuple[int, int]:
        """Return the distance of shifted views' borders and the last step's shift in pixels, used in every setting."""
        order = shifts(VIEW, STRIDE)
        return STRIDE * scores.CELL, order[(self.steps - 1) % len(order)] * scores.CELL

    def samples(self, setting: Setting, panoramas: int) -> list[tuple[str, int]]:
        """Return (prompt, seed) of each panorama of a setting, cycling through the prompts."""
        prompts = list(PROMPTS)
        return [(prompts[n % len(prompts)], n) for n in range(max(1, round(panoramas * setting.share)))]


@dataclass(frozen=True)
class SampleBatch:
    """Panoramas that are sampled together."""

    setting: Setting
    samples: tuple[tuple[str, int], ...]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    study = Study(options.pretrained, require_local(weights_id(options.pretrained), options.pretrained), options.steps)
    chosen = [
        setting
        for setting in settings(options.pretrained)
        if options.only.lower() in f"{setting.group}: {setting.name}".lower()
    ]
    if not chosen:
        groups = ", ".join(dict.fromkeys(setting.group for setting in settings(options.pretrained)))
        sys.exit(f"--only {options.only!r} matches no setting; the groups are {groups}")
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.out / "scores.jsonl"
    if options.estimate:
        return estimate(study, chosen, options)
    known = read_cache(cache)
    work = [] if options.report else list(missing(study, chosen, known, options.panoramas, options.batch))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the workers as well
    try:
        run(study, work, cache, options)
    except KeyboardInterrupt:
        sys.exit(f"stopped; rerun the same command to resume from {cache}")
    known = read_cache(cache)
    keys = {
        setting: [study.key(setting, *sample) for sample in study.samples(setting, options.panoramas)]
        for setting in chosen
    }
    rows = {setting: [known[key] for key in of_setting if key in known] for setting, of_setting in keys.items()}
    distances = fidelity.distances(
        options.out, study, {s: of_setting for s, of_setting in keys.items() if rows[s]}, options
    )
    rows = fidelity.with_sharpness(options.out, study, rows, options)
    write_report(options.out, {s: found for s, found in rows.items() if found}, study.steps, study.name, distances)
    print(f"{options.out}: scores.jsonl, report.md, figure.png")
    return None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--panoramas",
        type=_positive,
        default=64,
        help="per setting (default: 64)",
    )
    parser.add_argument("--steps", type=_positive, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of 'group: name', such as 'seams:'")
    parser.add_argument(
        "--pretrained", default="demo", help="demo, demo-dit or a folder with weights trained on the same images"
    )
    parser.add_argument("--batch", type=_positive, default=4, help="panoramas sampled together (default: 4)")
    parser.add_argument("--device", default="cpu", help="cuda samples in this process; use a larger --batch such as 32")
    parser.add_argument("--workers", type=_positive, default=len(os.sched_getaffinity(0)), help="number of processes")
    parser.add_argument("--threads", type=_positive, default=1, help="threads per process")
    parser.add_argument("--report", action="store_true", help="report the cached panoramas without sampling")
    parser.add_argument("--estimate", action="store_true", help="time two steps of each setting and estimate the total")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {number}")
    return number


def read_cache(path: Path) -> dict[str, dict]:
    """Read scores by key; truncate an incomplete last line of a killed run."""
    if not path.exists():
        return {}
    complete, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(complete) + 1 if complete else 0)
    return {row["key"]: row for row in map(json.loads, complete.splitlines())}


def missing(study: Study, chosen: Iterable[Setting], known: dict, panoramas: int, batch: int) -> Iterator[SampleBatch]:
    """Yield what is not in the cache, only once where two groups share a setting."""
    seen = set(known)
    for setting in chosen:
        samples = [sample for sample in study.samples(setting, panoramas) if study.key(setting, *sample) not in seen]
        seen.update(study.key(setting, *sample) for sample in samples)
        for start in range(0, len(samples), batch):
            yield SampleBatch(setting, tuple(samples[start : start + batch]))


def run(study: Study, work: list[SampleBatch], cache: Path, options: argparse.Namespace) -> None:
    """Sample and score panoramas; only this process writes the cache. On a GPU it also samples, and workers score."""
    total = sum(len(item.samples) for item in work)
    if not total:
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    spawn, features = multiprocessing.get_context("spawn"), cache.with_name(FEATURES)
    with (
        Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True)) as progress,
        open(cache, "a", encoding="utf-8") as stream,
        open(features, "a", encoding="utf-8") as features_stream,
        ProcessPoolExecutor(min(options.workers, len(work)), spawn, _start_worker, (options.threads,)) as pool,
    ):
        bar = progress.add_task("panoramas", total=total)
        try:
            for rows in _results(pool, study, work, options.device):
                features_stream.writelines(f"{row['key']} {row.pop('features')}\n" for row in rows)
                stream.writelines(json.dumps(rounded(row)) + "\n" for row in rows)
                stream.flush()
                progress.advance(bar, len(rows))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # skip the rest of the study
            raise


def rounded(value: Any) -> Any:
    """Round numbers to five digits to keep the cache small."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _results(pool: ProcessPoolExecutor, study: Study, work: list[SampleBatch], device: str) -> Iterator[list[dict]]:
    """Yield lines of the cache as they become available."""
    pending: set[Future] = set()
    for item in work:
        if device == "cpu":
            pending.add(pool.submit(sample_and_score, study, item))
        else:
            pending.add(pool.submit(rows_of, study, item, sample(study, item, device)))
            done, pending = wait(pending, timeout=0)
            yield from (future.result() for future in done)
    yield from (future.result() for future in as_completed(pending))


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _limit_threads(threads)


def _limit_threads(threads: int) -> None:
    import torch

    from madgen.backbones import silence_model_libraries

    torch.set_num_threads(threads)
    silence_model_libraries()


@lru_cache(maxsize=1)
def sampler_of(study: Study, setting: Setting, device: str = "cpu") -> PanoramaSampler:
    """Return the sampler of a setting, cached for consecutive batches."""
    return new_sampler(setting, study.pretrained, study.steps, device)


@dataclass(frozen=True)
class Sampled:
    """Panoramas of one batch and the values of their setting."""

    images: np.ndarray
    features: list[np.ndarray]
    """Of each panorama's crops [crops, D], see `coherence_fidelity.py`."""
    clips: list[float]
    shared: dict[str, Any]
    own_borders: list[int]


def sample(study: Study, batch: SampleBatch, device: str = "cpu") -> Sampled:
    setting, sampler = batch.setting, sampler_of(study, batch.setting, device)
    prompts, seeds = zip(*batch.samples, strict=True)
    started = time.perf_counter()
    images = sampler.sample(
        prompts,
        seeds=seeds,
        height=setting.height,
        width=setting.width,
        num_inference_steps=setting.own_steps(study.steps),
        guidance_scale=GUIDANCE,
        guidance_steps=setting.guidance_steps(study.steps),
        loop=setting.loop,
    )
    shared = {
        "setting": f"{setting.group}: {setting.name}",
        "weights": study.weights,
        "views": view_evaluations(sampler, setting, study.steps),
        "passes": unet_passes(sampler, setting, study.steps),
        "seconds": round((time.perf_counter() - started) / len(images), 3),
    }
    features, clips = fidelity.features_and_scores(images, prompts, device)
    return Sampled(images, features, clips, shared, last_borders(sampler, setting, study.steps))


def rows_of(study: Study, batch: SampleBatch, sampled: Sampled) -> list[dict]:
    """Return one line of the cache per panorama."""
    return [
        {"key": study.key(batch.setting, prompt, seed), "prompt": prompt, "seed": seed, **sampled.shared}
        | scores.score(image, PROMPTS[prompt], *study.borders())
        | {"own seam": scores.seam(image, sampled.own_borders) if sampled.own_borders else None, "clip": clip}
        | {"features": fidelity.packed(features)}
        | ({"energy": scores.fine_energy(image)} if batch.setting.sharpness else {})
        for (prompt, seed), image, features, clip in zip(
            batch.samples, sampled.images, sampled.features, sampled.clips, strict=True
        )
    ]


def sample_and_score(study: Study, batch: SampleBatch) -> list[dict]:
    """Sample and score in one process."""
    return rows_of(study, batch, sample(study, batch))


def last_borders(sampler: PanoramaSampler, setting: Setting, steps: int) -> list[int]:
    """Return where the views of the last step meet, in pixels; empty if they overlap, or for a single view."""
    views = sampler.geometry.build(setting.height, setting.width, setting.loop).at(setting.own_steps(steps) - 1)
    axis = views.columns if setting.width >= setting.height else views.rows
    starts = sorted(axis.starts)
    if setting.layout != "shifted" or any(b - a < axis.size for a, b in pairwise(starts[1:-1])):
        return []
    return [start * scores.CELL for start in starts[1:]]


def estimate(study: Study, chosen: list[Setting], options: argparse.Namespace) -> None:
    """Print seconds per panorama of each setting, from two steps of one batch, and the total."""
    _limit_threads(options.threads)
    print(f"load {os.getloadavg()[0]:.1f}, {options.threads} threads, CPU seconds per panorama of {study.steps} steps")
    work = list(missing(study, chosen, {}, options.panoramas, options.panoramas))
    total = 0.0
    for item in work:
        sampler, setting = sampler_of(study, item.setting, options.device), item.setting
        prompts, seeds = zip(*item.samples[: options.batch], strict=True)
        size = {"height": setting.height, "width": setting.width, "loop": setting.loop, "guidance_scale": GUIDANCE}
        started = time.process_time()
        sampler.sample(prompts, seeds=seeds, num_inference_steps=2, output="latent", **size)
        seconds = (time.process_time() - started) * setting.own_steps(study.steps) / 2 / len(prompts)
        total += seconds * len(item.samples)
        print(f"{seconds:7.2f} x {len(item.samples):3d}  {setting.group}: {setting.name}", flush=True)
    print(f"about {total / 60 / options.workers:.0f} min with {options.workers} workers on idle cores")


if __name__ == "__main__":
    main()
