"""Training pictures of the demo backbone: scenes rendered ahead of training, in parallel, each from its own seed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from madgen.demo.scenes import Scene, draw, is_held_out, random_scene


@dataclass(frozen=True)
class Pictures:
    """`images` uint8 [N, 128, 128, 3] and the `scenes` they show."""

    images: np.ndarray
    scenes: list[Scene]


def render(count: int, seed: int, held_out: bool = False) -> Pictures:
    """Renders `count` scenes whose combinations are the held-out ones, or all the others."""
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
