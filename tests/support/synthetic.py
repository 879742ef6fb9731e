"""Synthetic datasets in madgen's layout, without sampling."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

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
            shape = {"height": image.shape[0], "width": image.shape[1]}
            entries.append({"key": key, "prompt": prompt, "offset": offset, "size": tar.offset - offset} | shape)
            entries[-1]["seed"] = 0
    written = path.read_bytes()
    for entry in entries:
        records = written[entry["offset"] : entry["offset"] + entry["size"]]
        entry["sha256"] = hashlib.sha256(records).hexdigest()
    sidecar = {"shard": shard, "samples": entries, "quarantine": [], "quarantined": []}
    path.with_suffix(".json").write_text(json.dumps(sidecar))


def write_dataset(folder: Path, samples, per_shard=3, name="made", fingerprint=None) -> DatasetDir:
    """Write a dataset in shards of `per_shard` samples, in the given order."""
    (folder / "shards").mkdir(parents=True)
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(folder, f"{name}-{number:06d}", samples[start : start + per_shard])
    plan, job = {"samples": len(samples), "prompts": len({s[1] for s in samples})}, {"name": name}
    content = {"job": job, "plan": plan, "fingerprint": fingerprint or folder.name, "identity": {}}
    (folder / "dataset.json").write_text(json.dumps(content))
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
