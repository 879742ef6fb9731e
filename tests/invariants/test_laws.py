"""The laws of the sampler, over sizes, strides, layouts, blocks, batches and schedulers, on the tiny backbone.

A view has 8 cells of 4 px; the UNet's coarsest level has cells of 2.
"""

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madgen import Box, PanoramaSampler, Region
from madgen.diffusion.views import build_layout

VIEW, CELL, STEPS = 8, 4, 3
SCHEDULERS = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
]
few = settings(max_examples=8, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """One way to sample: what `PanoramaSampler` is made with, and what `sample` is asked for."""

    method: dict = field(hash=False)
    size: dict = field(hash=False)


@st.composite
def cases(draw):
    stride = draw(st.sampled_from([2, 4, 8]))
    loop = draw(st.booleans())
    turns = draw(st.integers(VIEW // stride, 20 // stride))
    columns = turns * stride if loop else VIEW + stride * draw(st.integers(0, 12 // stride))
    rows = VIEW + stride * draw(st.integers(0, 4 // stride))
    blocks = draw(st.lists(st.sampled_from(["down", "mid", "up"]), min_size=1, unique=True))
    method = {
        "layout": draw(st.sampled_from(["overlapping", "shifted"])),
        "stride": stride,
        "mad_blocks": blocks,
        "scheduler": draw(st.sampled_from(SCHEDULERS)),
    }
    return Case(method, {"height": rows * CELL, "width": columns * CELL, "loop": loop})


def sampler_of(tiny, method):
    if method["layout"] == "shifted":  # such views shift by single cells
        method = {name: value for name, value in method.items() if name != "stride"}
    return PanoramaSampler.from_pretrained(str(tiny), dtype="float32", **method)


@torch.no_grad()
def multidiffusion(sampler, prompt, seed, height, width, loop):
    """MultiDiffusion in a few lines: no batch of views, no processors, no gathered merge."""
    unet, scheduler = sampler.backbone.unet, sampler.new_scheduler(STEPS)
    embeddings = sampler.backbone.encode_prompts([prompt], [""], 2.0).embeddings_NTD
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, height // CELL, width // CELL, generator=generator) * scheduler.init_noise_sigma
    layout = sampler.geometry.build(height, width, loop)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for step, timestep in enumerate(scheduler.timesteps):
        views, scaled = layout.at(step), scheduler.scale_model_input(latents, timestep)
        total, count = torch.zeros_like(latents), torch.zeros_like(latents)
        for top in views.rows.starts:
            for left in views.columns.starts:
                columns = [(left + offset) % (width // CELL) for offset in range(VIEW)]
                view = scaled[:, :, top : top + VIEW][..., columns]
                without, with_prompt = unet(view.repeat(2, 1, 1, 1), timestep, embeddings).sample.chunk(2)
                total[:, :, top : top + VIEW, columns] += without + 2.0 * (with_prompt - without)
                count[:, :, top : top + VIEW, columns] += 1
        latents = scheduler.step(total / count, timestep, latents, **draws).prev_sample
    return latents


@pytest.fixture(scope="module")
def sample(tiny):
    """Latents of prompts, on one loaded backbone; made again only where the method differs."""
    loaded = {}

    def run(method, prompts, seeds, negatives=None, **size):
        if method["layout"] == "shifted" and method["mad_steps"] == 0:  # such views shift by single cells
            method = {name: value for name, value in method.items() if name != "stride"}
        key = repr(sorted(method.items()))
        if key not in loaded:
            loaded[key] = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", **method)
        options = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output": "latent", **size}
        return loaded[key].sample(prompts, negative_prompts=negatives, seeds=seeds, **options)

    return run


def several_views(case):
    """Whether any step has more than one view."""
    rows, columns = case.size["height"] // CELL, case.size["width"] // CELL
    arguments = (rows, columns, VIEW, case.method["stride"], case.size["loop"])
    layout = build_layout(case.method["layout"], *arguments)
    return any(layout.at(step).count > 1 for step in range(STEPS))


def close(one, other):
    return float((one - other).norm() / other.norm()) <= 1e-4


@few
@given(case=cases())
def test_mad_with_no_steps_is_multidiffusion(sample, tiny, case):
    """Against a loop of its own: each view through the network by itself, with diffusers' own attention."""
    method = {**case.method, "mad_steps": 0}
    ours = sample(method, ["a hill"], [1], **case.size)
    assert close(ours, multidiffusion(sampler_of(tiny, method), "a hill", 1, **case.size))


@few
@given(case=cases(), steps=st.integers(1, STEPS))
def test_mad_changes_the_picture_where_views_meet(sample, case, steps):
    merged, plain = (sample({**case.method, "mad_steps": tau}, ["a hill"], [1], **case.size) for tau in (steps, 0))
    shifts_alike = case.method["layout"] == "overlapping"  # other views in steps that do not merge: another picture
    assert not (close(merged, plain) and several_views(case))
    assert close(merged, plain) or several_views(case) or not shifts_alike


@few
@given(case=cases(), count=st.integers(2, 3), steps=st.integers(0, STEPS))
def test_a_prompt_does_not_depend_on_its_neighbours_in_the_batch(sample, case, count, steps):
    method = {**case.method, "mad_steps": steps}
    prompts, negatives = ["a hill", "the sea at night", "dunes"][:count], ["", "fog", "sun"][:count]
    together = sample(method, prompts, list(range(count)), negatives, **case.size)
    for index in range(count):
        alone = sample(method, prompts[index : index + 1], [index], negatives[index : index + 1], **case.size)
        assert close(together[index : index + 1], alone)


@few
@given(case=cases(), steps=st.integers(0, STEPS))
def test_every_cell_depends_on_the_prompt(sample, case, steps):
    """A cell that no view covered would not know the prompt: with the same noise, it would not differ."""
    method = {**case.method, "mad_steps": steps}
    one, other = (sample(method, [prompt], [1], **case.size) for prompt in ("a hill", "the sea at night"))
    assert one.shape == (1, 4, case.size["height"] // CELL, case.size["width"] // CELL)
    assert one.isfinite().all()
    assert bool(((one - other).abs().amax(1) > 1e-7).all())


@pytest.mark.slow
@few
@given(case=cases(), steps=st.integers(0, STEPS))
def test_a_region_of_the_same_prompt_changes_nothing(sample, case, steps):
    method = {**case.method, "mad_steps": steps, "region_bootstrapping": 0}
    region = Region(Box(0, 0, 12, 20), "a hill", "fog")
    plain = sample(method, ["a hill"], [1], ["fog"], **case.size)
    assert close(sample(method, ["a hill"], [1], ["fog"], regions=[[region]], **case.size), plain)


@pytest.mark.slow
@few
@given(case=cases(), bootstrapping=st.integers(0, STEPS))
def test_region_of_the_whole_canvas_equals_its_prompt(sample, case, bootstrapping):
    method = {**case.method, "mad_steps": 1, "region_bootstrapping": bootstrapping}
    everything = Region(Box(0, 0, case.size["width"], case.size["height"]), "the sea", "fog")
    covered = sample(method, ["a hill"], [1], regions=[[everything]], **case.size)
    assert close(covered, sample(method, ["the sea"], [1], ["fog"], **case.size))


@pytest.mark.slow
@few
@given(case=cases())
def test_regions_do_not_affect_other_panoramas_in_the_batch(sample, case):
    method = {**case.method, "mad_steps": 2, "region_bootstrapping": 2}
    region = Region(Box(8, 4, 28, 30), "the sea", "fog")
    together = sample(method, ["a hill", "dunes"], [1, 2], regions=[[region], []], **case.size)
    assert close(together[:1], sample(method, ["a hill"], [1], regions=[[region]], **case.size))
    assert close(together[1:], sample(method, ["dunes"], [2], **case.size))
