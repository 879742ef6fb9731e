"""Training data of the demo backbone: scenes and captions generated in parallel before training, one seed each."""

from __future__ import annotations

import multiprocessing
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from demo_backbone.scenes import Scene, caption, draw, is_held_out, random_scene

EMPTY_CAPTIONS = 0.1
"""Share of captions to drop, for classifier-free guidance."""
UNKNOWN_WORDS = 0.15
"""Share of captions with a meaningless word, for robustness to free prompts."""


@dataclass(frozen=True)
class Pictures:
    """Images uint8 [N, 128, 128, 3] and their scenes."""

    images: np.ndarray
    scenes: list[Scene]


def render(count: int, seed: int, held_out: bool = False) -> Pictures:
    """Render `count` scenes with held-out combinations of attributes, or with all others."""
    jobs = [(seed, index, held_out) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        drawn = list(track(pool.imap(_render_one, jobs, chunksize=64), description="drawing scenes", total=count))
    scenes, images = zip(*drawn, strict=True)
    return Pictures(np.stack(images), list(scenes))


def _render_one(job: tuple[int, int, bool]) -> tuple[Scene, np.ndarray]:
    seed, index, held_out = job
    rng = np.random.default_rng((seed, index, int(held_out)))
    scene = next(scene for scene in _scenes(rng) if is_held_out(scene) == held_out)
    return scene, draw(scene, rng)


def _scenes(rng: np.random.Generator) -> Iterator[Scene]:
    while True:
        yield random_scene(rng)


def draw_captions(scenes: list[Scene], each: int, seed: int, *, corrupt: bool) -> list[list[str]]:
    """Draw `each` captions for every scene; if `corrupt`, some are empty or contain a meaningless word."""
    jobs = [(seed, index, scene, each, corrupt) for index, scene in enumerate(scenes)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        return list(track(pool.imap(_captions_of, jobs, chunksize=256), description="captions", total=len(jobs)))


def _captions_of(job: tuple[int, int, Scene, int, bool]) -> list[str]:
    seed, index, scene, each, corrupt = job
    rng = np.random.default_rng((seed, index, 2))
    texts = [caption(scene, rng) for _ in range(each)]
    return [_corrupted(text, rng) for text in texts] if corrupt else texts


def _corrupted(text: str, rng: np.random.Generator) -> str:
    if rng.random() < EMPTY_CAPTIONS:
        return ""
    words = text.split(" ")
    if rng.random() < UNKNOWN_WORDS:
        nonsense = "".join(rng.choice(list(string.ascii_lowercase), int(rng.integers(3, 9))))
        words.insert(int(rng.integers(0, len(words) + 1)), nonsense)
    return " ".join(words)
