"""Jobs whose prompt lines name a picture each, such as those of ControlNets and IP-Adapters."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise_picture(seed: int = 0, height: int = 32, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_prompts(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_picture_job(job_file: Path, column: str, backbone: str) -> Path:
    """Give a job 3 prompts with the pictures `<column>0.png` and so on, and further settings of its backbone."""
    lines = []
    for index in range(3):
        noise_picture(index).save(job_file.with_name(f"{column}{index}.png"))
        lines.append({"prompt": f"mountains over a meadow at noon {index}", column: f"{column}{index}.png"})
    write_prompts(job_file.parent, lines)
    text = job_file.read_text(encoding="utf-8").replace("prompts.txt", "prompts.jsonl")
    job_file.write_text(text.replace("pretrained:", f"{backbone}, pretrained:"), encoding="utf-8")
    return job_file


def samples_of(dataset: Path) -> dict[tuple[str, int], tuple[dict[str, Any], np.ndarray]]:
    """Return the metadata and the image of each sample, by the last letter of its prompt and its index."""
    samples = {}
    for path in sorted((dataset / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in (name for name in tar.getnames() if name.endswith(".json")):
                record = json.load(tar.extractfile(name))
                image = np.array(Image.open(tar.extractfile(f"{record['key']}.png")))
                samples[record["prompt"][-1], record["sample_index"]] = record, image
    return samples
