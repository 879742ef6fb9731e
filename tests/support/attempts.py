"""Samplers with fallbacks, and the tasks that they sample."""

from madgen import PanoramaSampler
from madgen.config.schema import SamplingConfig
from madgen.generation.robust_sampler import RobustSampler
from madgen.types import Prompt, Task

SAMPLING = {"num_inference_steps": 2, "guidance_scale": 3.0}


TEXTS = ["mountains over a meadow at noon", "the sea at night", "hills"]


def tasks(texts=TEXTS, width=64):
    return [Task(f"{i}-0000", Prompt(str(i), text, "", 32, width), 0, 10 + i) for i, text in enumerate(texts)]


def build(folder, dtype="float32", mad_steps=1, **sampling):
    sampler = PanoramaSampler.from_pretrained(str(folder), dtype=dtype, mad_steps=mad_steps)
    return RobustSampler(sampler, SamplingConfig(**{**SAMPLING, **sampling}))


def raising(error):
    def fail(*_, **__):
        raise error

    return fail
