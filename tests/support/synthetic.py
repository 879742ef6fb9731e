"""Synthetic datasets in madgen's layout, without sampling."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from madgen.dataset.format import Manifest, PlanTotals, SampleEntry, Sidecar
from madgen.dataset.layout import DatasetDir


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shard(folder, shard, samples):
    """Write a tar and its sidecar as `madgen.dataset.shards.writer` does; `samples` are (key, prompt, image)."""
    path, entries = folder / "shards" / f"{shard}.tar", []
    with tarfile.open(path, "w") as tar:
        for key, prompt, image in samples:
            offset, stream = tar.offset, io.BytesIO()
            Image.fromarray(image).save(stream, "png")
            metadata = {"key": key, "prompt": prompt, "negative_prompt": "", "prompt_id": key.rpartition("-")[0]}
            for suffix, data in (("png", stream.getvalue()), ("json", json.dumps(metadata).encode())):
                add(tar, f"{key}.{suffix}", data)
            add(tar, f"{key}.txt", prompt.encode())
            entries.append(SampleEntry(key, 0, prompt, offset, tar.offset - offset, "", *image.shape[:2]))
    path.with_suffix(".json").write_bytes(Sidecar(shard, 0, with_checksums(path, entries)).to_json())


def with_checksums(tar, entries):
    written = tar.read_bytes()
    digests = [hashlib.sha256(written[entry.offset :][: entry.size]).hexdigest() for entry in entries]
    return tuple(replace(entry, sha256=digest) for entry, digest in zip(entries, digests, strict=True))


def write_dataset(folder: Path, samples, per_shard=3, name="made", fingerprint=None) -> DatasetDir:
    """Write a dataset in shards of `per_shard` samples, in the given order."""
    (folder / "shards").mkdir(parents=True)
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(folder, f"{name}-{number:06d}", samples[start : start + per_shard])
    plan = PlanTotals(len({s[1] for s in samples}), len(samples), -(-len(samples) // per_shard), per_shard, "")
    manifest = Manifest(fingerprint or folder.name, {"name": name}, plan)
    (folder / "dataset.json").write_bytes(manifest.to_json())
    return DatasetDir(folder)


def textures(prompts, count, height, width, seed=0):
    """Return smooth random images in a colour per prompt: (key, prompt, image)."""
    rng, made = np.random.default_rng(seed), []
    for number, prompt in enumerate(prompts):
        base = np.random.default_rng(number + 100).uniform(60, 200, 3)
        for index in range(count):
            small = Image.fromarray(rng.integers(0, 80, (8, 8 * width // height, 3), dtype=np.uint8))
            smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
            image = (smooth + base * 0.7).clip(0, 255).astype(np.uint8)
            made.append((f"p{number}-{index:04d}", prompt, image))
    return made


def cut(samples, side=32, seed=0):
    """Wrap samples as the runner does for metrics."""
    from madgen.metrics.crops import CroppedImage, Crops

    return [CroppedImage(key, prompt, image, Crops(side, seed)) for key, prompt, image in samples]


PROMPTS = ("mountains at sunset", "the sea")
