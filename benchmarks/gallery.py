"""Measure the gallery of a large dataset in a browser: `python benchmarks/gallery.py [--samples 10000] [--keep DIR]`.

Writes a dataset of 512x3072 px JPEGs (a few textures of 1/f noise, repeated), creates its page with `madgen preview`,
opens it several times in a headless Chromium with an empty cache, and prints a table. Needs Debian's chromium and
chromium-driver, and the `test` extra.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from measured_commands import ROOT, measure, new_dataset
from PIL import Image

from madgen.dataset.format import SampleEntry, Sidecar, to_json
from madgen.dataset.layout import DatasetDir
from madgen.types import Shard

sys.path.insert(0, str(ROOT / "tests" / "support"))
from browser import DESKTOP, PHONE, open_chromium, show_on
from synthetic import with_checksums

HEIGHT, WIDTH = 512, 3072
TEXTURES = 16
TIMED = """
const done = arguments[0], [filter, order] = [document.getElementById('filter'), document.getElementById('order')];
const waited = (change) => new Promise((resolve) => {
  const grid = document.getElementById('grid'), begin = performance.now();
  const seen = new MutationObserver(() => {
    seen.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - begin)));
  });
  seen.observe(grid, { childList: true });
  change();
});
(async () => {
  const filtered = await waited(() => { filter.value = 'lake 777'; filter.dispatchEvent(new Event('input')); });
  await waited(() => { filter.value = ''; filter.dispatchEvent(new Event('input')); });
  const sorted = await waited(() => { order.value = 'coherence best'; order.dispatchEvent(new Event('change')); });
  const scrolled = await waited(() => scrollTo(0, document.body.scrollHeight / 2));
  const paint = performance.getEntriesByName('first-contentful-paint')[0].startTime;
  const read = performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd;
  done([paint, read, filtered, sorted, scrolled]);
})();
"""
TIMES = ("first contentful paint", "page parsed", "filter", "sort by a score", "scroll to the middle")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for the dataset and its page, reused if it exists")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        if not (root / "out/dataset.json").exists():
            root.mkdir(parents=True, exist_ok=True)
            write_dataset(root, options.samples)
        cost = measure(["preview", "out"], root)
        page = root / "out/preview.html"
        print(f"{options.samples:,} panoramas, {HEIGHT}x{WIDTH} px")
        print(
            f"madgen preview: {cost.seconds:.0f} s, {cost.peak_mb:.0f} MB; page: {page.stat().st_size / 1e6:.0f} MB\n"
        )
        print("| milliseconds | desktop, median | max | phone size, median | max |\n|---|---|---|---|---|")
        columns = [time_visits(page, options.times, phone) for phone in (False, True)]
        for name, *times in zip(TIMES, *columns, strict=True):
            cells = (f"{statistics.median(each):.0f} | {max(each):.0f}" for each in times)
            print(f"| {name} | {' | '.join(cells)} |")


def write_dataset(root: Path, samples: int) -> None:
    """Write a finished dataset."""
    prompts = (f"a mountain lake at noon seen from the hills, number {i}, with clouds" for i in range(samples))
    run = new_dataset(root, prompts, {"height": HEIGHT, "width": WIDTH, "loop": True}, {"format": "jpg"})
    images, scores = [texture(number) for number in range(TEXTURES)], random.Random(0)
    for index in range(run.plan.shard_count):
        write_shard(run.directory, run.plan.shard(index), images, scores)


def texture(number: int) -> bytes:
    """Return a JPEG of 1/f noise, about as compressible as a photograph."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]) + 1 / WIDTH
    noise = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((HEIGHT, WIDTH))) / frequency**1.4) for _ in range(3)]
    image_HWC = np.stack([128 + 40 * (noise[0] + 0.2 * channel) / noise[0].std() for channel in noise], axis=2)
    stream = io.BytesIO()
    Image.fromarray(image_HWC.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_shard(directory: DatasetDir, shard: Shard, images: list[bytes], scores: random.Random) -> None:
    """Write a tar and its sidecar."""
    entries = []
    with tarfile.open(directory.tar(shard.name), "w") as tar:
        for task in shard.tasks:
            values = {name: round(scores.uniform(0.7, 1.3), 4) for name in ("seam", "wrap", "coherence")}
            start, text = tar.offset, task.prompt.text
            settings = {
                "sampling": {"loop": True, "num_inference_steps": 50},
                "fingerprint": "0" * 32,
                "scores": values,
            }
            contents = {
                "json": to_json({"key": task.key, "prompt": text, "seed": task.seed, **settings}),
                "jpg": images[task.seed % len(images)],
            }
            for suffix, content in contents.items():
                info = tarfile.TarInfo(f"{task.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            size = tar.offset - start
            entries.append(SampleEntry(task.key, task.seed, text, start, size, "", HEIGHT, WIDTH, values))
    samples = with_checksums(directory.tar(shard.name), entries)
    directory.sidecar(shard.name).write_bytes(Sidecar(shard.name, shard.index, samples).to_json())


def time_visits(page: Path, times: int, phone: bool) -> list[list[float]]:
    """Return milliseconds, one row for each of `TIMES` and one column per visit, each in a new browser."""
    visits = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as profile, open_chromium(Path(profile)) as driver:
            show_on(driver, PHONE if phone else DESKTOP, touch=phone)
            driver.get(page.resolve().as_uri())
            visits.append(driver.execute_async_script(TIMED))
    return [list(column) for column in zip(*visits, strict=True)]


if __name__ == "__main__":
    main()
