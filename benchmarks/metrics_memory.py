"""Whether scoring takes flat memory: `python benchmarks/metrics_memory.py DIR [--panoramas 1000]`.

Writes synthetic panoramas of 64x256 px and squares into DIR, scores them through an untrained CLIP (clip_score,
coherence, fid, kid, giqa), and prints the peak of the resident memory after each tenth of the pass.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from madgen.dataset.format import Manifest, PlanTotals, SampleEntry, Sidecar
from madgen.dataset.layout import DatasetDir
from madgen.demo.scenes import vocabulary
from madgen.demo.tokenizer import build_tokenizer
from madgen.demo.training.train_clip import new_clip, save_clip
from madgen.evaluation import runner
from madgen.evaluation.evaluate import Evaluation, evaluate
from madgen.metrics.crops import Crops
from madgen.metrics.extractors import Extractors, parse

PROMPTS = ("mountains", "the sea", "hills at noon", "a forest")
METRICS = ("clip_score", "coherence", "fid", "kid", "giqa")


def peak_mb() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_dataset(folder: Path, count: int, width: int, per_shard: int = 50) -> DatasetDir:
    """Noise of `count` pictures, 64 px high, in the layout of a finished dataset."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width)
    for start in range(0, count, per_shard):
        name, entries = f"made-{start // per_shard:06d}", []
        with tarfile.open(folder / "shards" / f"{name}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, count)):
                prompt = number * len(PROMPTS) // count
                key, offset, stream = f"p{prompt}-{number:04d}", tar.offset, io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, width, 3), dtype=np.uint8)).save(stream, "png")
                text = json.dumps({"prompt": PROMPTS[prompt]}).encode()
                for suffix, data in (("png", stream.getvalue()), ("json", text)):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                entries.append((key, PROMPTS[prompt], offset, tar.offset - offset))
        written = (folder / "shards" / f"{name}.tar").read_bytes()
        samples = tuple(
            SampleEntry(key, 0, text, at, size, hashlib.sha256(written[at : at + size]).hexdigest(), 64, width)
            for key, text, at, size in entries
        )
        sidecar = Sidecar(name, start // per_shard, samples)
        (folder / "shards" / f"{name}.json").write_bytes(sidecar.to_json())
    plan = PlanTotals(len(PROMPTS), count, -(-count // per_shard), per_shard, "")
    (folder / "dataset.json").write_bytes(Manifest("made", {"name": "made"}, plan).to_json())
    return DatasetDir(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--panoramas", type=int, default=1000)
    options = parser.parse_args()
    directory = write_dataset(options.folder / f"panoramas-{options.panoramas}", options.panoramas, 256)
    squares = write_dataset(options.folder / "squares", 200, 64)
    clip = options.folder / "clip"
    clip.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary(), clip)
    save_clip(new_clip(tokenizer), tokenizer, clip)
    networks = Extractors(parse(f"{clip},vgg=random"), torch.device("cpu"))
    parts = options.folder / f"parts-{time.time_ns()}"
    began, done, plain = time.monotonic(), 0, runner.Bar.advance

    def advance(bar: runner.Bar, count: int) -> None:
        nonlocal done
        done += count
        plain(bar, count)
        if done % max(options.panoramas // 10, 1) < count and done <= options.panoramas:
            print(f"{done} panoramas: peak {peak_mb():.0f} MB, {time.monotonic() - began:.0f} s", flush=True)

    runner.Bar.advance = advance  # type: ignore[method-assign]
    evaluate(Evaluation(directory, squares, METRICS, networks, Crops(64), parts, parts / "squares"))
    print(f"all scores: peak {peak_mb():.0f} MB, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
