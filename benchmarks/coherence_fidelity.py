"""Fidelity in the coherence study: Fréchet distance of demo CLIP features between crops and square images, sharpness.

The square images of one view, by the same backbone and for the same prompts, are the reference of all settings.
"""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import coherence_scores as scores
import numpy as np
from coherence_settings import GUIDANCE, PROMPTS, family

from madgen.demo import CLIP_WEIGHTS
from madgen.metrics.fid import distance as frechet_distance

BOOTSTRAPS = 40
FIRST_SEED = 10_000
"""Seeds of the square images, different from the panoramas'."""


@lru_cache
def _clip(device: str) -> Any:
    from madgen.backbones import silence_model_libraries
    from madgen.models import clip

    silence_model_libraries()
    return clip.load(str(CLIP_WEIGHTS), device)


def features_and_scores(
    images: np.ndarray, prompts: Sequence[str], device: str
) -> tuple[list[np.ndarray], list[float]]:
    """Return the features of each panorama's crops [crops, D], and 100 times the mean cosine of crops and prompt."""
    import torch

    clip, parts = _clip(device), [scores.crops(image) for image in images]
    features = _features([part for crops in parts for part in crops], device).split([len(crops) for crops in parts])
    cosines = [
        torch.nn.functional.cosine_similarity(crops, clip.text_features(prompt)).mean()
        for crops, prompt in zip(features, prompts, strict=True)
    ]
    return [crops.cpu().numpy() for crops in features], [100 * float(cosine) for cosine in cosines]


def _features(images: list[np.ndarray], device: str) -> Any:
    """Return normalized features, float32 [N, D]."""
    import torch

    return torch.nn.functional.normalize(_clip(device).features(images))


def packed(features: np.ndarray) -> str:
    """Encode features in half precision and base64."""
    return base64.b64encode(features.astype(np.float16).tobytes()).decode()


Distance = tuple[float, float | None]
"""1000 times a Fréchet distance, and its standard deviation when panoramas are resampled; None if unknown."""


def distances(folder: Path, study: Any, keys: Mapping[Any, Sequence[str]], options: Namespace) -> dict[str, Distance]:
    """Return the Fréchet distance of each setting; cached in `fidelity.json` where features are missing."""
    store, features = folder / "fidelity.json", _read(folder / "features.txt")
    known = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    names = {f"{setting.group}: {setting.name}": list(of_setting) for setting, of_setting in keys.items()}
    fresh = {
        name: of_setting
        for name, of_setting in names.items()
        if of_setting and all(key in features for key in of_setting)
    }
    if fresh:
        reference = _reference(folder, study, options)
        for name, of_setting in fresh.items():
            known[name] = _distance([features[key] for key in of_setting], reference)
        store.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {name: tuple(known[name]) for name in names if name in known}


def _distance(panoramas: Sequence[np.ndarray], reference: np.ndarray) -> Distance:
    """Return the distance of the crops' features [crops, D] of all panoramas, with a bootstrap over panoramas."""
    generator = np.random.default_rng(0)  # the same panoramas in every setting
    chosen = [range(len(panoramas)), *generator.integers(len(panoramas), size=(BOOTSTRAPS, len(panoramas)))]
    value, *resampled = (
        1000 * frechet_distance(np.concatenate([panoramas[n] for n in numbers]), reference) for numbers in chosen
    )
    return round(value, 3), round(float(np.std(resampled)), 3)


def with_sharpness(folder: Path, study: Any, rows: Mapping[Any, Sequence[Mapping]], options: Namespace) -> dict:
    """Add the sharpness: fine energy in percent of the mean of the prompt's square images."""
    path = folder / f"sharpness-{options.panoramas}.json"
    if not path.exists() and any("energy" in row for of_setting in rows.values() for row in of_setting):
        _reference(folder, study, options)
    squares = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        setting: [
            {**row, "sharpness": 100 * row["energy"] / squares[row["prompt"]]} if "energy" in row else row
            for row in of_setting
        ]
        for setting, of_setting in rows.items()
    }


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    lines = (line.split(" ") for line in path.read_text(encoding="utf-8").splitlines())
    width = _width()
    return {
        key: np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64).reshape(-1, width)
        for key, text in lines
    }


def _width() -> int:
    return json.loads((CLIP_WEIGHTS / "config.json").read_text(encoding="utf-8"))["projection_dim"]


def _reference(folder: Path, study: Any, options: Namespace) -> np.ndarray:
    """Return the cached features [N, D] of the square images, `options.panoramas` per prompt."""
    squares = options.panoramas
    path, energies = folder / f"reference-{squares}.npy", folder / f"sharpness-{squares}.json"
    if not (path.exists() and energies.exists()):
        from madgen import PanoramaSampler

        device, parts = options.device, []
        energy: dict[str, list[float]] = {prompt: [] for prompt in PROMPTS}
        sampler = PanoramaSampler.from_pretrained(
            study.pretrained, name=family(study.pretrained), layout="whole", mad_steps=0, dtype="float32", device=device
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
                parts.append(_features(list(images), device).cpu().numpy())
                energy[prompt] += [scores.fine_energy(image) for image in images]
        np.save(path, np.concatenate(parts).astype(np.float16))
        means = {prompt: float(np.mean(found)) for prompt, found in energy.items()}
        energies.write_text(json.dumps(means, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return np.load(path).astype(np.float64)
