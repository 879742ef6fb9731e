"""How closed loops are: `python benchmarks/loop_closure.py [--panoramas 32]`, on the demo backbone.

The step from a picture's last column to its first, over the mean step between all other neighbouring columns, over that
at the other borders of latent cells (where the decoder's steps are larger, anywhere in a picture), and over that at
the other borders of views; means over all pictures. 1 is closed, open pictures show what is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scores import CELL, closure
from settings import GUIDANCE, PROMPTS

from madgen import PanoramaSampler

STRIDE = 4 * CELL
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "MultiDiffusion": ({"mad_steps": 0}, 20),
    "MAD in every step": ({"mad_steps": 20}, 20),
    "MAD, shifted views (16 of 20)": ({"layout": "shifted", "mad_steps": 16}, 20),
    "fast (20 of 25)": ({"layout": "shifted", "mad_steps": 20, "scheduler": "UniPCMultistepScheduler"}, 25),
}


def pictures(options: dict[str, Any], steps: int, count: int, device: str, loop: bool) -> Iterator[np.ndarray]:
    """The same prompts and seeds in every method, uint8 [128, 512, 3]."""
    sampler = PanoramaSampler.from_pretrained("demo", dtype="float32", device=device, **options)
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
    for name, (options, steps) in METHODS.items():
        for loop in (True, False):
            made = list(pictures(options, steps, given.panoramas if loop else 8, given.device, loop))
            row = " | ".join(f"{closure(made, period):.2f}" for period in (1, CELL, STRIDE))
            print(f"| {name} | {'loop' if loop else 'open'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
