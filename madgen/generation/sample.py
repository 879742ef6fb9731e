"""Sample panoramas of one prompt: `madgen sample`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from madgen.config.schema import Job
from madgen.config.unused_settings import unused_method_settings
from madgen.dataset.encoding import check_side, encode_image
from madgen.dataset.sample_json import recorded_pictures
from madgen.generation.quiet import quieten
from madgen.generation.safety import Checked, Safety
from madgen.generation.single_image import check_output, step_bar
from madgen.prompts.parsing import MAX_SEED
from madgen.sampling.inputs import PanoramaBatch
from madgen.sampling.postprocess import to_uint8
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Prompt, Task
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)


def sample_panoramas(prompt: Prompt, outputs: Sequence[Path], job: Job) -> None:
    """Write one panorama to each path, with consecutive seeds from `prompts.seed` on."""
    image_format = check_output(outputs[0])
    check_side(image_format, prompt.height, prompt.width)
    if (last := job.prompts.seed + len(outputs) - 1) > MAX_SEED:
        raise UserError(f"--num={len(outputs)} needs seeds up to {last}, above 2^64 - 1; lower --seed or --num")
    quieten()
    device = "cuda" if torch.cuda.is_available() and job.trainer.accelerator != "cpu" else "cpu"
    sampler = PanoramaSampler.from_job(job, device)
    safety = Safety.load(job.safety, sampler)
    sampler.warns = True  # this prompt was not planned
    for reason in unused_method_settings(job.method):
        logger.warning(reason)
    for number, output in enumerate(outputs):
        seed, variation = job.prompts.seed + number, min(number, job.prompts.samples_per_prompt - 1)
        blend = job.method.noise.blend.of_sample(variation, job.prompts.seed)
        with _naming_the_picture(prompt):
            image = sample_image(sampler, Task("", prompt, number, seed, blend))
        if safety is not None:
            image = _checked(safety(image), job.safety.checker)
        metadata = _metadata(job, prompt, seed)
        data = encode_image(image, image_format, job.output.quality, job.sampling.loop, metadata)
        write_atomically(output, data)
        print(output)


@contextmanager
def _naming_the_picture(prompt: Prompt) -> Iterator[None]:
    """Add to an error about the size that it is the picture's."""
    try:
        yield
    except UserError as error:
        if "image" in prompt.pictures and str(error).startswith(("height=", "width=")):
            fix = "the size is that of --image: set sampling.height and sampling.width, or --scale"
            raise UserError(f"{error}; {fix}") from error
        raise


def _metadata(job: Job, prompt: Prompt, seed: int) -> dict[str, Any]:
    """Return the metadata to embed: a sample's JSON without the parts that need a dataset."""
    resolved = job.as_dict()
    prompts = {name: resolved["prompts"][name] for name in ("negative_prompt", "seed", "regions", "across")}
    settings = {name: resolved[name] for name in ("backbone", "method", "sampling")}
    settings["sampling"] |= {"height": prompt.height, "width": prompt.width}
    return {"prompt": prompt.text, **prompts, "seed": seed, **recorded_pictures(prompt), **settings}


def sample_image(sampler: PanoramaSampler, task: Task) -> np.ndarray:
    """Sample one panorama, uint8 [H, W, 3], with a bar of its steps on a terminal."""
    params = sampler.params
    batch = PanoramaBatch.from_tasks([task], params.init)
    with step_bar(params.denoising_steps(sampler.backbone.spec.joint_attention)) as on_step:
        latents = sampler.sample_latents(batch, on_step=on_step)
    image: np.ndarray = to_uint8(sampler.decode_batch(latents, batch, params))[0]
    return image


def _checked(checked: Checked, checker: str | None) -> np.ndarray:
    if checked.dropped:
        raise UserError(f"safety.checker={checker}: {checked.summary}; not written, because safety.action=drop")
    if checked.flagged:
        print(f"{checked.summary}: {checked.flagged}", file=sys.stderr)
    return checked.image_HWC
