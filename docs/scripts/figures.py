"""Generate the documentation's pictures and coherence table: `python docs/scripts/figures.py [NAME ...]`.

NAME is `panoramas`, `pairs`, or a key of METHOD_PICTURES; by default all are generated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from madgen import Box, PanoramaSampler, Region
from madgen.types import Ramp

IMAGES = Path(__file__).resolve().parents[1] / "images"
SIZE = {"height": 128, "width": 768, "num_inference_steps": 20, "guidance_scale": 3.0}
SHOWN = [
    ("mountains over the sea at sunset with a sun", 3),
    ("hills over a meadow at noon with clouds", 1),
    ("dunes over a desert at noon with a sun", 2),
    ("mountains over a lavender field at dawn", 4),
    ("a forest over snow at dawn", 5),
    ("a city skyline over the water at sunset", 6),
]
OPEN_PROMPTS = ["mountains", "the sea", "a landscape panorama", "hills", "a forest", "a meadow with trees"]
PAIRS = [("mountains", 0), ("a landscape panorama", 0), ("a meadow with trees", 1)]
TRANSFORMER = {
    "MultiDiffusion": {"mad_steps": 0},
    "MAD in 5 of 20 steps": {"mad_steps": 5},
    "MAD in every step, single stream blocks": {"mad_steps": 20, "mad_blocks": ["single"]},
    "MAD in every step, all blocks: the canvas at once": {"mad_steps": 20},
}
METHODS = {"MultiDiffusion": 0, "MAD, 10 of 20 steps": 10, "MAD, all 20 steps": 20}
CITY = Region(Box(288, 40, 480, 128), "a city skyline over the water")
FOUR = ["mountains at dawn", "mountains at noon", "mountains at sunset", "mountains at night"]
ACROSS = [Region(Ramp(index, len(FOUR)), text) for index, text in enumerate(FOUR) if index]
WIDE = {"mad_steps": 0, "stride": 10}
METHOD_PICTURES = {  # name: (prompt, method, sampling)
    "direct": ("mountains", {"layout": "whole", "mad_steps": 0}, {}),
    "multidiffusion": ("mountains", {"mad_steps": 0}, {}),
    "mad": ("mountains", {"mad_steps": 20}, {}),
    "sync": ("mountains", {"mad_steps": 0, "sync_weight": 20.0, "sync_steps": 10, "sync_network": "random"}, {}),
    "shifted": ("mountains", {"layout": "shifted", "mad_steps": 0}, {}),
    "shifted-mad": ("mountains", {"layout": "shifted", "mad_steps": 16}, {}),
    "guided-fusion": ("mountains", {**WIDE, "overrides": ["method.merge.weights=radial"]}, {}),
    "mixture-of-diffusers": ("mountains", {**WIDE, "overrides": ["method.merge.weights=gaussian"]}, {}),
    "variance-corrected": ("mountains", {**WIDE, "overrides": ["sampling.scheduler=DDPMScheduler"]}, {}),
    "safa": ("mountains", {**WIDE, "overrides": ["method.merge.operator=swap"]}, {}),
    "safa-reference": ("mountains", {**WIDE, "overrides": ["method.merge={operator: swap, reference_steps: 10}"]}, {}),
    "aligned": ("mountains", {**WIDE, "overrides": ["method.noise.align=0.5"]}, {}),
    "mad-swap": ("mountains", {"mad_steps": 16, "stride": 8, "overrides": ["method.merge.operator=swap"]}, {}),
    "loop": ("hills over a meadow", {"mad_steps": 20}, {"loop": True}),
    "regions": ("hills over the water at sunset", {"mad_steps": 10}, {"regions": [[CITY]]}),
    "across": (FOUR[0], {"mad_steps": 10}, {"regions": [ACROSS]}),
    "grid": ("mountains over the sea at sunset", {"mad_steps": 20}, {"height": 256, "width": 512}),
}
GAP, CAPTION = 6, 20  # pixels


def panorama(sampler: PanoramaSampler, prompt: str, seed: int) -> np.ndarray:
    return sampler.sample([prompt], seeds=[seed], **SIZE)[0]


def sheet(rows: list[tuple[str, np.ndarray]], path: Path) -> None:
    """Save pictures in one column, each below its caption."""
    width, step = SIZE["width"], SIZE["height"] + CAPTION + GAP
    canvas = Image.new("RGB", (width, step * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for index, (caption, image) in enumerate(rows):
        draw.text((2, index * step + 2), caption, fill=(60, 60, 60), font=font)
        canvas.paste(Image.fromarray(image), (0, index * step + CAPTION))
    canvas.save(path, quality=90)


def spread(image: np.ndarray) -> tuple[float, float]:
    """Return the standard deviation over six square crops of their mean sky and ground colors (0..255)."""
    crops = np.split(image.astype(float), 6, axis=1)
    bands = (slice(0, 32), slice(96, 128))
    return tuple(np.std([crop[band].mean(axis=(0, 1)) for crop in crops], axis=0).mean() for band in bands)


def methods(names: list[str]) -> None:
    """Sample one panorama per method, with the same seed."""
    (IMAGES / "methods").mkdir(exist_ok=True)
    for name in track(names, "methods"):
        prompt, method, sampling = METHOD_PICTURES[name]
        sampler = PanoramaSampler.from_pretrained("demo", **method)
        (image,) = sampler.sample([prompt], seeds=[0], **{**SIZE, **sampling})
        Image.fromarray(image).save(IMAGES / "methods" / f"{name}.jpg", quality=90)


def panoramas() -> None:
    """Sample the panoramas at the top of the README."""
    mad = PanoramaSampler.from_pretrained("demo", mad_steps=20)
    sheet([(prompt, panorama(mad, prompt, seed)) for prompt, seed in SHOWN], IMAGES / "panoramas.jpg")


def pairs() -> None:
    """Compare MultiDiffusion and MAD: pairs of panoramas, and the table of color spreads."""
    samplers = {name: PanoramaSampler.from_pretrained("demo", mad_steps=steps) for name, steps in METHODS.items()}
    multidiffusion, _, mad = samplers.values()
    rows = []
    for prompt, seed in PAIRS:
        rows.append((f"“{prompt}”, MultiDiffusion", panorama(multidiffusion, prompt, seed)))
        rows.append((f"“{prompt}”, MAD", panorama(mad, prompt, seed)))
    sheet(rows, IMAGES / "mad_vs_multidiffusion.jpg")
    print("| method | sky | ground |\n|---|---|---|")
    for name, sampler in samplers.items():
        pictures = [panorama(sampler, prompt, seed) for seed, prompt in enumerate(track(OPEN_PROMPTS, name))]
        sky, ground = np.mean([spread(picture) for picture in pictures], axis=0)
        print(f"| {name} | {sky:.1f} | {ground:.1f} |")


def transformer() -> None:
    """Sample one prompt with the demo transformer, with the same seed in every setting."""
    rows = []
    for name, settings in TRANSFORMER.items():
        sampler = PanoramaSampler.from_pretrained("demo-dit", name="flux", **settings)
        rows.append((name, panorama(sampler, "mountains at sunset", 2)))
    sheet(rows, IMAGES / "transformer.jpg")


def main(names: list[str]) -> None:
    if not names or "panoramas" in names:
        panoramas()
    if not names or "pairs" in names:
        pairs()
    if not names or "transformer" in names:
        transformer()
    methods([name for name in METHOD_PICTURES if not names or name in names])


if __name__ == "__main__":
    main(sys.argv[1:])
