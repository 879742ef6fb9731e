"""How quick the gallery of a large dataset is: `python benchmarks/gallery.py [--samples 10000] [--keep FOLDER]`.

Writes a dataset of 512x3072 px JPEGs (a few textures, 1/f noise, again and again), lets `madgen preview` make its
page, opens that in a headless Chromium some times, each with an empty cache, and prints a table. Needs Debian's
chromium and chromium-driver, and the `test` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from resume_scale import measure

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.format import SampleEntry, Sidecar, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import build_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from browser import DESKTOP, PHONE, open_chromium, show_on

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
TIMES = ("first contentful paint", "page read to its end", "filter", "sort by a score", "scroll to the middle")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a folder for the dataset and its page, used again if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        if not (root / "out/dataset.json").exists():
            root.mkdir(parents=True, exist_ok=True)
            build(root, options.samples)
        seconds, peak = measure(["preview", "out"], root)
        page = root / "out/preview.html"
        print(f"{options.samples:,} panoramas, {HEIGHT}x{WIDTH} px")
        print(f"madgen preview: {seconds:.0f} s, {peak:.0f} MB; the page: {page.stat().st_size / 1e6:.0f} MB\n")
        print("| milliseconds | desktop, median | worst | phone's size, median | worst |\n|---|---|---|---|---|")
        columns = [visits(page, options.times, phone) for phone in (False, True)]
        for name, *times in zip(TIMES, *columns, strict=True):
            cells = (f"{statistics.median(each):.0f} | {max(each):.0f}" for each in times)
            print(f"| {name} | {' | '.join(cells)} |")


def build(root: Path, samples: int) -> None:
    """A finished dataset."""
    lines = (f"a mountain lake at noon seen from the hills, number {i}, with clouds\n" for i in range(samples))
    (root / "prompts.txt").write_text("".join(lines))
    (root / "job.yaml").write_text(
        f"backbone: {{pretrained: demo}}\nsampling: {{height: {HEIGHT}, width: {WIDTH}, loop: true}}\n"
        f"prompts: {{source: prompts.txt}}\noutput: {{dir: {root.resolve()}/out, format: jpg}}\n"
        "monitor: {wandb: {mode: disabled}}\ntrainer: {accelerator: cpu, devices: 1}\n"
    )
    job = load_job(root / "job.yaml")
    plan, directory = build_plan(job), DatasetDir(job.output_dir)
    manifest.create(directory, manifest.build(job, plan, "float32"))
    pictures = [texture(number) for number in range(TEXTURES)]
    scores = random.Random(0)
    for index in range(plan.shard_count):
        write_shard(directory, plan.shard(index), pictures, scores)


def texture(number: int) -> bytes:
    """A JPEG of 1/f noise, about as hard to compress as a photograph."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]) + 1 / WIDTH
    noise = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((HEIGHT, WIDTH))) / frequency**1.4) for _ in range(3)]
    image_HWC = np.stack([128 + 40 * (noise[0] + 0.2 * channel) / noise[0].std() for channel in noise], axis=2)
    stream = io.BytesIO()
    Image.fromarray(image_HWC.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_shard(directory: DatasetDir, shard, pictures: list[bytes], scores: random.Random) -> None:  # type: ignore[no-untyped-def]
    """One tar and its sidecar."""
    entries = []
    with tarfile.open(directory.tar(shard.name), "w") as tar:
        for task in shard.tasks:
            found = {name: round(scores.uniform(0.7, 1.3), 4) for name in ("seam", "wrap", "coherence")}
            start, text = tar.offset, task.prompt.text
            settings = {"sampling": {"loop": True, "num_inference_steps": 50}, "fingerprint": "0" * 32, "scores": found}
            contents = {
                "json": to_json({"key": task.key, "prompt": text, "seed": task.seed, **settings}),
                "jpg": pictures[task.seed % len(pictures)],
            }
            for suffix, content in contents.items():
                info = tarfile.TarInfo(f"{task.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            entries.append((task.key, task.seed, text, start, tar.offset - start, found))
    written = directory.tar(shard.name).read_bytes()
    samples = tuple(
        SampleEntry(*place, hashlib.sha256(written[place[3] :][: place[4]]).hexdigest(), HEIGHT, WIDTH, found)
        for *place, found in entries
    )
    directory.sidecar(shard.name).write_bytes(Sidecar(shard.name, shard.index, samples).to_json())


def visits(page: Path, times: int, phone: bool) -> list[list[float]]:
    """Milliseconds, a row for each of `TIMES`, a column for each visit, in a browser of its own."""
    found = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as profile, open_chromium(Path(profile)) as driver:
            show_on(driver, PHONE if phone else DESKTOP, touch=phone)
            driver.get(page.resolve().as_uri())
            found.append(driver.execute_async_script(TIMED))
    return [list(column) for column in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
