"""Whether crops of panoramas are still pictures of the backbone: demo CLIP's features of them, as FID has Inception's.

The reference are square pictures of the same prompts by the same backbone, of one view, whatever the setting.
"""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scores
from settings import GUIDANCE, PROMPTS

from madgen.demo import CLIP_WEIGHTS

FIRST_SEED = 10_000
"""Far from the panoramas' seeds."""


@lru_cache
def _clip(device: str) -> Any:
    from madgen.backbones import quieten
    from madgen.models import clip as _clip

    quieten()
    return _clip.load(str(CLIP_WEIGHTS), device)


def looks(images: np.ndarray, prompts: Sequence[str], device: str) -> tuple[list[np.ndarray], list[float]]:
    """For each panorama features of its crops [crops, D], and 100 times the mean cosine of crops and prompt."""
    import torch

    clip, parts = _clip(device), [scores.crops(image) for image in images]
    features = _features([part for crops in parts for part in crops], device).split([len(crops) for crops in parts])
    cosines = [
        torch.nn.functional.cosine_similarity(found, clip.text_features(prompt)).mean()
        for found, prompt in zip(features, prompts, strict=True)
    ]
    return [found.cpu().numpy() for found in features], [100 * float(cosine) for cosine in cosines]


def _features(images: list[np.ndarray], device: str) -> Any:
    """Of length 1, float32 [N, D]."""
    import torch

    return torch.nn.functional.normalize(_clip(device).features(images))


def packed(features: np.ndarray) -> str:
    """Half precision, base64."""
    return base64.b64encode(features.astype(np.float16).tobytes()).decode()


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Distance of the Gaussians of two sets of features [N, D] (Heusel et al., 2017)."""
    first, second = (np.cov(features, rowvar=False) for features in (one, other))
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(min=0))
    means = one.mean(axis=0) - other.mean(axis=0)
    return float(means @ means + np.trace(first + second) - 2 * roots.sum())


def distances(folder: Path, study: Any, keys: Mapping[Any, Sequence[str]], options: Namespace) -> dict[str, float]:
    """Frechet distance x 1000 of each setting, by its panoramas' keys; those made elsewhere from `fidelity.json`."""
    store, features = folder / "fidelity.json", _read(folder / "features.txt")
    known = json.loads(store.read_text()) if store.exists() else {}
    names = {f"{setting.group}: {setting.name}": list(wanted) for setting, wanted in keys.items()}
    fresh = {name: wanted for name, wanted in names.items() if wanted and all(key in features for key in wanted)}
    if fresh:
        reference = _reference(folder, study, options)
        for name, wanted in fresh.items():
            known[name] = round(1000 * frechet(np.concatenate([features[key] for key in wanted]), reference), 3)
        store.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    return {name: known[name] for name in names if name in known}


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    lines = (line.split(" ") for line in path.read_text().splitlines())
    width = _width()
    return {
        key: np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64).reshape(-1, width)
        for key, text in lines
    }


def _width() -> int:
    return json.loads((CLIP_WEIGHTS / "config.json").read_text())["projection_dim"]


def _reference(folder: Path, study: Any, options: Namespace) -> np.ndarray:
    """Features [N, D] of the square pictures, of each prompt as many as panoramas of a setting; made once."""
    squares = options.panoramas
    path = folder / f"reference-{squares}.npy"
    if not path.exists():
        from madgen import PanoramaSampler

        device, found = options.device, []
        sampler = PanoramaSampler.from_pretrained(
            study.pretrained, layout="whole", mad_steps=0, dtype="float32", device=device
        )
        for number, prompt in enumerate(PROMPTS):
            seeds = range(FIRST_SEED + number * squares, FIRST_SEED + (number + 1) * squares)
            for start in range(0, squares, options.batch):
                images = sampler.sample(
                    [prompt] * len(seeds[start : start + options.batch]),
                    seeds=seeds[start : start + options.batch],
                    height=scores.SIZE,
                    width=scores.SIZE,
                    num_inference_steps=study.steps,
                    guidance_scale=GUIDANCE,
                )
                found.append(_features(list(images), device).cpu().numpy())
        np.save(path, np.concatenate(found).astype(np.float16))
    return np.load(path).astype(np.float64)
