"""Measure how closed looped panoramas are, on the demo backbone: `python benchmarks/loop_closure.py [--panoramas 32]`.

Compares the step from an image's last column to its first with the mean step between all other neighbouring columns, at
the other borders of latent cells (where the decoder causes larger steps), and at the other borders of views. A ratio of
1 is closed; open panoramas are listed for comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from coherence_scores import CELL, closure
from coherence_settings import GUIDANCE, PROMPTS
from measured_commands import CONFIGS

from madgen import PanoramaSampler, load_job

STRIDE = 4 * CELL
METHODS = {
    "MultiDiffusion": ("multidiffusion",),
    "MAD in every step": ("mad", "method.mad.steps=20"),
    "MAD, shifted views (16 of 20)": ("mad-shifted", "method.mad.steps=16"),
    "fast (20 of 25)": ("fast",),
}
"""Presets of configs/method with overrides: merging in four fifths of the demo's 20 steps, or in all."""


def panoramas(name: str, count: int, device: str, loop: bool) -> Iterator[np.ndarray]:
    """Yield panoramas with the same prompts and seeds in every method, uint8 [128, 512, 3]."""
    preset, *overrides = METHODS[name]
    job = load_job([CONFIGS / "backbone/demo.yaml", CONFIGS / f"method/{preset}.yaml"], overrides)
    sampler, steps = PanoramaSampler.from_job(job, device), job.sampling.num_inference_steps
    size = {"height": 128, "width": 512, "num_inference_steps": steps, "guidance_scale": GUIDANCE, "loop": loop}
    prompts = list(PROMPTS)
    for seed in range(0, count, 8):
        seeds = list(range(seed, min(seed + 8, count)))
        yield from sampler.sample([prompts[seed % len(prompts)] for seed in seeds], seeds=seeds, **size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--panoramas", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print("| method | | all columns | borders of cells | borders of views |\n|---|---|---|---|---|")
    for name in METHODS:
        for loop in (True, False):
            images = list(panoramas(name, options.panoramas if loop else 8, options.device, loop))
            row = " | ".join(f"{closure(images, period):.2f}" for period in (1, CELL, STRIDE))
            print(f"| {name} | {'loop' if loop else 'open'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
