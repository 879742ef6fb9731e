"""Sample a single panorama: `madgen sample`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from madgen.config.loader import load_job
from madgen.config.schema import Job
from madgen.dataset.encoding import check_side, encode_image
from madgen.generation.quiet import quieten
from madgen.generation.safety import Checked, Safety
from madgen.prompts.regions import parse_regions
from madgen.sampling.inputs import PanoramaBatch
from madgen.sampling.sampler import PanoramaSampler
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.validation import text

FORMATS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
DEFAULTS = [
    "sampling.height=128",
    "sampling.width=768",
    "sampling.num_inference_steps=20",
    "sampling.guidance_scale=3.0",
]


def sample_one(prompt: str, output: Path, job_file: Path | None, overrides: list[str]) -> None:
    """Write one panorama to `output`; without a job file, sample the demo backbone with MAD."""
    job = load_job([job_file], overrides) if job_file else load_job([], [*DEFAULTS, *overrides])
    text("the prompt", prompt)
    if not prompt.strip():
        raise UserError("the prompt is empty")
    image_format = check_output(output)
    check_side(image_format, job.sampling.height, job.sampling.width)
    image = _sample(job, prompt)
    data = encode_image(image, image_format, job.output.quality, job.sampling.loop, _metadata(job, prompt))
    write_atomically(output, data)
    print(output)


def _metadata(job: Job, prompt: str) -> dict[str, Any]:
    """Return the metadata to embed: a sample's JSON without the parts that need a dataset."""
    resolved = job.as_dict()
    prompts = {name: resolved["prompts"][name] for name in ("negative_prompt", "seed", "regions", "across")}
    return {"prompt": prompt, **prompts, **{name: resolved[name] for name in ("backbone", "method", "sampling")}}


def check_output(output: Path) -> str:
    """Return the image format of a file name. Raises UserError if the file cannot be written."""
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"-o {output} must end in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise UserError(f"-o {output}: the folder {output.parent} does not exist")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"-o {output} cannot be written; choose another path")
    return FORMATS[output.suffix.lower()]


def _sample(job: Job, prompt: str) -> np.ndarray:
    quieten()
    device = "cuda" if torch.cuda.is_available() and job.trainer.accelerator != "cpu" else "cpu"
    sampler = PanoramaSampler.from_job(job, device)
    safety = Safety.load(job.safety, sampler)
    sampler.warn_if_truncated = True  # this prompt was not planned
    params, negative = sampler.params, job.prompts.negative_prompt
    fields = {"regions": job.prompts.regions, "across": job.prompts.across, "negative_prompt": negative}
    regions = list(parse_regions("prompts", fields, Path()))
    height, width = job.sampling.height, job.sampling.width
    blend = job.method.noise.blend.of_sample(0, job.prompts.seed)
    batch = PanoramaBatch(height, width, [prompt], [negative], [job.prompts.seed], [regions], blends=[blend])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=params.num_inference_steps)

        def advance(step: int, timestep: Tensor, latents_BCHW: Tensor) -> Tensor:
            progress.update(task, completed=step + 1)
            return latents_BCHW

        latents = sampler.sample_latents(batch, on_step=advance)
        image = sampler.decode(latents, params.loop, params.decode)[0]
    return image if safety is None else _checked(safety(image), job.safety.checker)


def _checked(checked: Checked, checker: str | None) -> np.ndarray:
    if checked.dropped:
        raise UserError(f"safety.checker={checker}: {checked.summary}; not written, because safety.action=drop")
    if checked.flagged:
        print(f"{checked.summary}: {checked.flagged}", file=sys.stderr)
    return checked.image_HWC
