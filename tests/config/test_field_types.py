"""A job that Python code builds is checked when it is built, like a job file."""

import re

import numpy as np
import pytest

from madgen import Job, UserError
from madgen.config.schema import BackboneConfig, LoraConfig, PromptsConfig, SamplingConfig


def test_mappings_become_sections():
    job = Job(
        prompts={"source": "a.txt", "seed": 3},
        method={"mad": {"steps": 2, "blocks": ["up"]}},
        backbone={"loras": [{"weights": "a.safetensors", "scale": 2}]},
    )
    assert job.prompts == PromptsConfig(source="a.txt", seed=3)
    assert job.method.mad.steps == 2
    assert job.backbone == BackboneConfig(loras=[LoraConfig(weights="a.safetensors", scale=2)])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prompts": {"sauce": "a"}}, "unknown key 'prompts.sauce'; did you mean 'source'?"),
        ({"prompts": "a.txt"}, "prompts must be a PromptsConfig or a mapping of its keys, got 'a.txt'"),
        ({"prompts": {"limit": "3"}}, "prompts.limit must be a whole number or None, got '3'"),
        ({"prompts": PromptsConfig(split=5)}, "prompts.split must be a string, got 5"),
        ({"method": {"mad": {"steps": 2.5}}}, "method.mad.steps must be a whole number or None, got 2.5"),
        ({"method": {"mad": {"blocks": "up"}}}, "method.mad.blocks must be a list, got 'up'"),
        ({"sampling": {"loop": 1}}, "sampling.loop must be True or False, got 1"),
        ({"sampling": SamplingConfig(height=True)}, "sampling.height must be a whole number, got True"),
        ({"sampling": {"height": np.float32(64)}}, "sampling.height must be a whole number, got"),
        ({"output": {"dir": 5}}, "output.dir must be a string or None, got 5"),
        ({"backbone": {"loras": ["a"]}}, "an item of backbone.loras must be a LoraConfig or a mapping of its keys"),
        ({"name": 5}, "name must be a string, got 5"),
        ({"prompts": {"samples_per_prompt": 0}}, "prompts.samples_per_prompt must be in 1..10000, got 0"),
    ],
)
def test_wrong_values_are_refused_at_construction(sections, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Job(**sections)
