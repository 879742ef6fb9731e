"""Compare methods at continuing a picture: `python benchmarks/outpaint.py out/demo [--pictures 6]`.

The middle 128 px of each panorama are kept, the rest of 128x512 px is generated. In each row, the mean color of the
kept part is compared with that of the generated one: mean absolute difference in levels, lower is more coherent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from madgen import PanoramaSampler
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry

WIDTH, KEPT, FEATHER = 512, slice(192, 320), 16
METHODS = {"MultiDiffusion": 0, "MAD in every step": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--pictures", type=int, default=6)
    arguments = parser.parse_args()
    dataset = DatasetDir(arguments.source)
    entries = list(dataset.entries())
    chosen = entries[:: max(1, len(entries) // arguments.pictures)][: arguments.pictures]
    known = np.zeros((128, WIDTH), bool)
    known[:, KEPT] = True
    print("| method | difference in levels | standard error |\n|---|---|---|")
    for name, steps in METHODS.items():
        overrides = [f"sampling.init.feather={FEATHER}"]
        sampler = PanoramaSampler.from_pretrained("demo", mad_steps=steps, dtype="float32", overrides=overrides)
        differences = []
        for number, entry in enumerate(chosen):
            image = read_entry(dataset, entry).image_HWC[:, 128 : 128 + WIDTH]
            (result,) = sampler.sample(
                [entry.prompt], images=[image], masks=[known], strength=1.0, seeds=[number], num_inference_steps=10,
                guidance_scale=3.0,
            )  # fmt: skip
            rows = [result[:, part].mean(1, keepdims=True) for part in (KEPT, slice(0, 160), slice(352, WIDTH))]
            differences.append(np.mean([np.abs(rows[0] - other).mean() for other in rows[1:]]))
        error = np.std(differences, ddof=1) / np.sqrt(len(differences))
        print(f"| {name} | {np.mean(differences):.1f} | {error:.1f} |", flush=True)


if __name__ == "__main__":
    main()
