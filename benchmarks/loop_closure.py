"""How closed loops are: `python benchmarks/loop_closure.py [--panoramas 32]`, on the demo backbone.

The step from a picture's last column to its first, over the mean step between all other neighbouring columns, over that
at the other borders of latent cells (where the decoder's steps are larger, anywhere in a picture), and over that at
the other borders of views; means over all pictures. 1 is closed, open pictures show what is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scores import CELL, closure
from settings import GUIDANCE, PROMPTS

from madgen import PanoramaSampler, load_job

STRIDE = 4 * CELL
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METHODS = {
    "MultiDiffusion": ("multidiffusion",),
    "MAD in every step": ("mad", "method.mad.steps=20"),
    "MAD, shifted views (16 of 20)": ("mad-shifted", "method.mad.steps=16"),
    "fast (20 of 25)": ("fast",),
}
"""A preset of configs/method, and what is set beside it: four fifths of the demo's 20 steps, or all."""


def pictures(name: str, count: int, device: str, loop: bool) -> Iterator[np.ndarray]:
    """The same prompts and seeds in every method, uint8 [128, 512, 3]."""
    preset, *changes = METHODS[name]
    job = load_job([CONFIGS / "backbone/demo.yaml", CONFIGS / f"method/{preset}.yaml"], changes)
    sampler, steps = PanoramaSampler.from_job(job, device), job.sampling.num_inference_steps
    size = {"height": 128, "width": 512, "num_inference_steps": steps, "guidance_scale": GUIDANCE, "loop": loop}
    prompts = list(PROMPTS)
    for seed in range(0, count, 8):
        seeds = list(range(seed, min(seed + 8, count)))
        yield from sampler.sample([prompts[seed % len(prompts)] for seed in seeds], seeds=seeds, **size)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--panoramas", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    print("| method | | all columns | borders of cells | borders of views |\n|---|---|---|---|---|")
    for name in METHODS:
        for loop in (True, False):
            made = list(pictures(name, given.panoramas if loop else 8, given.device, loop))
            row = " | ".join(f"{closure(made, period):.2f}" for period in (1, CELL, STRIDE))
            print(f"| {name} | {'loop' if loop else 'open'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
