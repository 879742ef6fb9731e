"""`method.mad.share` refers to the steps of each call of a sampler."""

import numpy as np
import pytest
import torch

from madgen import PanoramaSampler, load_job
from madgen.config.schema import MadConfig, MethodConfig

CALL = {"height": 32, "width": 96, "seeds": [3], "guidance_scale": 2.0, "output": "latent"}


def latents(sampler, steps):
    return sampler.sample(["a hill"], num_inference_steps=steps, **CALL)


@pytest.mark.parametrize(("share", "steps", "merged"), [(0.5, 4, 2), (0.5, 6, 3), (0.0, 4, 0), (1.0, 3, 3)])
def test_share_of_each_call_equals_that_many_steps(tiny, share, steps, merged):
    by_share = PanoramaSampler.from_pretrained(str(tiny), overrides=[f"method.mad.share={share}"])
    by_steps = PanoramaSampler.from_pretrained(str(tiny), mad_steps=merged)
    other = PanoramaSampler.from_pretrained(str(tiny), mad_steps=(merged + 1) % (steps + 1))
    assert torch.equal(latents(by_share, steps), latents(by_steps, steps))
    assert not torch.equal(latents(by_share, steps), latents(other, steps))


def test_calls_like_a_pipeline_and_samplers_of_jobs_take_the_share(tiny):
    words = [f"backbone.pretrained={tiny}", "sampling.num_inference_steps=20", "method.mad.share=0.5"]
    by_steps = PanoramaSampler.from_pretrained(str(tiny), mad_steps=2)
    expected = latents(by_steps, 4)
    assert torch.equal(latents(PanoramaSampler.from_job(load_job([], words)), 4), expected)
    method = MethodConfig(mad=MadConfig(share=0.5))
    by_share = PanoramaSampler.from_configs(load_job([], words).backbone, method)
    assert torch.equal(latents(by_share, 4), expected)
    images = [
        sampler("a hill", 32, 96, 4, generator=torch.Generator().manual_seed(3), output_type="np").images
        for sampler in (by_share, by_steps)
    ]
    assert np.array_equal(*images)


def test_shifted_views_that_are_never_merged_move_by_any_cell(tiny):
    """A share that rounds to no step is SpotDiffusion, whose views need no stride."""
    by_share = PanoramaSampler.from_pretrained(str(tiny), layout="shifted", overrides=["method.mad.share=0.1"])
    plain = PanoramaSampler.from_pretrained(str(tiny), layout="shifted", mad_steps=0)
    assert torch.equal(latents(by_share, 4), latents(plain, 4))


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"mad_steps": 5}, ["method.mad.steps=5 is more than sampling.num_inference_steps=4: MAD is in all of them"]),
        ({"mad_steps": 4}, []),
        ({"overrides": ["method.mad.share=1"]}, []),
        ({"layout": "whole", "mad_steps": 5}, ["method.mad.steps=5 has no effect with layout=whole"]),
        (
            {"mad_steps": 0, "sync_weight": 1, "sync_steps": 5, "sync_network": "random"},
            ["method.sync.steps=5 is more than sampling.num_inference_steps=4: SyncDiffusion is in all of them"],
        ),
        (
            {"mad_steps": 0, "sync_weight": 1, "sync_steps": 50, "sync_every": 5, "sync_network": "random"},
            ["method.sync.every=5 is more than sampling.num_inference_steps=4: SyncDiffusion is in no step"],
        ),
        (
            {"mad_steps": 0, "region_bootstrapping": 5},
            ["method.regions.bootstrapping=5 is more than sampling.num_inference_steps=4: regions are bootstrapped"],
        ),
    ],
)
def test_steps_beyond_the_schedule_are_logged_once(tiny, caplog, options, notes):
    sampler = PanoramaSampler.from_pretrained(str(tiny), **options)
    for _ in range(2):
        sampler.sample(["a hill"], num_inference_steps=4, height=32, width=32, seeds=[3], output="latent")
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == len(notes)
    assert all(line.startswith(note) for line, note in zip(logged, notes, strict=True))
