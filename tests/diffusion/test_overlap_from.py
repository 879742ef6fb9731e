"""Shifted views that overlap from a step on, and guidance in some steps."""

import numpy as np
import pytest
import torch

from madgen import PanoramaSampler
from madgen.diffusion.views import build_layout
from madgen.utils.errors import UserError

SIZE = {"height": 128, "width": 256, "num_inference_steps": 4, "guidance_scale": 3.0}


def latents(sampler, **keywords):
    return sampler.sample(["hills", "dunes"], seeds=[1, 2], output="latent", **{**SIZE, **keywords})


@pytest.fixture(scope="module")
def plain():
    return PanoramaSampler.from_pretrained("demo", dtype="float32", mad_steps=2)


@pytest.mark.parametrize("loop", [False, True])
def test_shifted_views_equal_overlapping_ones_from_the_step_on(loop):
    layout = build_layout("shifted", 16, 64, 16, 4, loop, merged_steps=3, overlap_from=5)
    shifted = build_layout("shifted", 16, 64, 16, 4, loop, merged_steps=3)
    overlapping = build_layout("overlapping", 16, 64, 16, 4, loop)
    assert [layout.at(step) for step in range(5)] == [shifted.at(step) for step in range(5)]
    assert all(layout.at(step) == overlapping.at(step) for step in (5, 6, 20))


@pytest.mark.slow
def test_shifted_views_that_overlap_from_the_first_step_are_overlapping_ones(plain):
    shifted = PanoramaSampler.from_pretrained(
        "demo", dtype="float32", mad_steps=2, layout="shifted", overlap_from=0
    )  # fmt: skip
    assert torch.equal(latents(shifted), latents(plain))


def test_stride_applies_to_shifted_views_that_overlap_without_mad():
    PanoramaSampler.from_pretrained("demo", layout="shifted", mad_steps=0, overlap_from=2, stride=2)
    with pytest.raises(UserError, match="stride has no effect"):
        PanoramaSampler.from_pretrained("demo", layout="shifted", mad_steps=0, stride=2)
    with pytest.raises(UserError, match="overlap_from"):
        PanoramaSampler.from_pretrained("demo", overlap_from=2)


def test_guidance_interval_of_all_steps_equals_plain_guidance(plain):
    assert torch.equal(latents(plain, guidance_steps=(0, 4)), latents(plain))


def test_steps_without_guidance_take_one_pass(plain, monkeypatch):
    paths, forward = [], plain.backbone.unet.forward
    monkeypatch.setattr(
        plain.backbone.unet, "forward", lambda sample, *a, **k: paths.append(len(sample)) or forward(sample, *a, **k)
    )
    some = latents(plain, guidance_steps=(1, 3))
    views = 5
    assert paths == [2 * views, 4 * views, 4 * views, 2 * views]
    assert np.linalg.norm(some - latents(plain)) > 1e-2 * np.linalg.norm(some)


@pytest.mark.slow
def test_step_without_guidance_equals_guidance_scale_1(plain):
    assert torch.allclose(
        latents(plain, guidance_steps=(0, 1), num_inference_steps=1), latents(plain, num_inference_steps=1)
    )
    first = []
    for keywords in ({"guidance_scale": 1.0}, {"guidance_steps": (1, 4)}):
        seen = []
        create = plain.backbone.new_scheduler
        plain.backbone.new_scheduler = lambda *options, create=create, seen=seen: _spied(create(*options), seen)
        latents(plain, **keywords)
        del plain.backbone.new_scheduler
        first.append(seen[0])
    assert torch.allclose(*first, rtol=1e-5, atol=1e-5)


def _spied(scheduler, seen):
    """Keeps what each step is given as noise."""
    take = scheduler.step

    def step(noise, *arguments, **keywords):
        seen.append(noise)
        return take(noise, *arguments, **keywords)

    scheduler.step = step
    return scheduler


@pytest.mark.parametrize("steps", [(0, 5), (2, 2), (-1, 2), (1,)])
def test_impossible_guidance_steps_are_refused(plain, steps):
    with pytest.raises(UserError, match="guidance_steps"):
        latents(plain, guidance_steps=steps)
