"""Small datasets for studies, and simulated participants who know the key."""

import json

import numpy as np
from plans import table_of

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.shards.writer import OpenShard
from madgen.types import Prompt, Record

HOSTILE = "a <script>alert('1')</script> & \"quoted\" <!--\n</script\u2028> <img src=https://x.invalid onerror=x>"
TEXTS = ("snow on hills", "dunes at night", "a city by the sea", HOSTILE)


def make_dataset(root, shade, texts=TEXTS, samples=2, size=(32, 192), ids="p", image_format="png"):
    """Write a finished dataset of ramps along the longer side, in one shade of blue per dataset."""
    height, width = size
    prompts = tuple(Prompt(f"{ids}{at}", text, "", height, width) for at, text in enumerate(texts))
    plan = Plan("job", table_of(prompts, samples), samples, 3, 0)
    directory = DatasetDir(root)
    job = load_job([], ["name=job"])
    manifest.create(directory, manifest.manifest(job, plan, job_identity(job, plan, "float32", WeightIds(str(shade)))))
    for index in range(plan.shard_count):
        shard = OpenShard(directory, plan.shard(index), "w")
        for position, task in enumerate(plan.shard(index).tasks):
            ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
            image = np.full((height, width, 3), shade, np.uint8)
            image[..., 0] = ramp[None, :] if width >= height else ramp[:, None]
            image[..., 1] = 20 * int(task.prompt.id.removeprefix(ids)) + 9 * task.sample_index
            about = {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": height, "width": width}
            shard.add(position, encode_sample(Record(task, image, about), image_format, 95))
        shard.publish()
    return root


def answers_of(key, name, prefer, controls_right=None, swap=False):
    """Return the export of a participant: `prefer(item)` is a dataset index, or None for no difference."""
    given, right = [], 0
    for position, (item, about) in enumerate(key["items"].items()):
        first, second = sorted(about["pictures"], reverse=swap)
        if "right" in about:
            right += 1
            fails = controls_right is not None and right > controls_right
            picked = about["right"] if not fails else next(p for p in (first, second) if p != about["right"])
        else:
            wanted = prefer(about)
            picked = next((p for p in (first, second) if key["pictures"][p]["dataset"] == wanted), None)
        choice = {first: "first", second: "second"}.get(picked, "same")
        entry = {"item": item, "position": position, "first": first, "second": second, "choice": choice}
        given.append({**entry, "seconds": 1.5})
    about = {"madgen_study": 1, "study": key["study"], "participant": name, "seed": 1, "started": "", "finished": True}
    return {**about, "answers": given}


def write_answers(folder, *answers):
    """Write one file per participant and return the paths."""
    paths = [folder / f"answers-{at}.json" for at, _ in enumerate(answers)]
    for path, content in zip(paths, answers, strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths
