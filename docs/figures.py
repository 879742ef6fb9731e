"""Makes the README's pictures and its coherence table with the demo backbone: `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from madgen import PanoramaSampler

HERE = Path(__file__).parent
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
METHODS = {"MultiDiffusion": 0, "MAD, 10 of 20 steps": 10, "MAD, all 20 steps": 20}
GAP, CAPTION = 6, 20  # pixels


def panorama(sampler: PanoramaSampler, prompt: str, seed: int) -> np.ndarray:
    return sampler.sample([prompt], seeds=[seed], **SIZE)[0]


def sheet(rows: list[tuple[str, np.ndarray]], path: Path) -> None:
    """Pictures under each other, each with its caption above it."""
    width, step = SIZE["width"], SIZE["height"] + CAPTION + GAP
    canvas = Image.new("RGB", (width, step * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for index, (caption, image) in enumerate(rows):
        draw.text((2, index * step + 2), caption, fill=(60, 60, 60), font=font)
        canvas.paste(Image.fromarray(image), (0, index * step + CAPTION))
    canvas.save(path, quality=90)


def spread(image: np.ndarray) -> tuple[float, float]:
    """Standard deviation, between the six square crops, of their mean sky and ground colour (0..255); 0 is uniform."""
    crops = np.split(image.astype(float), 6, axis=1)
    bands = (slice(0, 32), slice(96, 128))
    return tuple(np.std([crop[band].mean(axis=(0, 1)) for crop in crops], axis=0).mean() for band in bands)


def main() -> None:
    samplers = {name: PanoramaSampler.from_pretrained("demo", mad_steps=steps) for name, steps in METHODS.items()}
    multidiffusion, _, mad = samplers.values()
    sheet([(prompt, panorama(mad, prompt, seed)) for prompt, seed in SHOWN], HERE / "panoramas.jpg")
    rows = []
    for prompt, seed in PAIRS:
        rows.append((f"“{prompt}”, MultiDiffusion", panorama(multidiffusion, prompt, seed)))
        rows.append((f"“{prompt}”, MAD", panorama(mad, prompt, seed)))
    sheet(rows, HERE / "mad_vs_multidiffusion.jpg")
    print("| method | sky | ground |\n|---|---|---|")
    for name, sampler in samplers.items():
        pictures = [panorama(sampler, prompt, seed) for seed, prompt in enumerate(track(OPEN_PROMPTS, name))]
        sky, ground = np.mean([spread(picture) for picture in pictures], axis=0)
        print(f"| {name} | {sky:.1f} | {ground:.1f} |")


if __name__ == "__main__":
    main()
