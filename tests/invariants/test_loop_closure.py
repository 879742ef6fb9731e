"""A looped panorama has no seam: measured on pictures of the demo backbone."""

import numpy as np
import pytest
from scores import closure
from settings import GUIDANCE, PROMPTS

from madgen import PanoramaSampler

STRIDE, BATCH = 32, 16  # px, panoramas


@pytest.fixture(scope="module")
def sampler():
    return PanoramaSampler.from_pretrained("demo", mad_steps=2, dtype="float32")


def pictures(sampler, count, loop):
    size = {"height": 128, "width": 192, "num_inference_steps": 6, "guidance_scale": GUIDANCE, "loop": loop}
    for start in range(0, count, BATCH):
        yield from sampler.sample(list(PROMPTS), seeds=list(range(start, start + BATCH)), **size)


def test_the_step_across_the_edge_is_no_larger_than_elsewhere(sampler):
    """The edge is a border of views, and is compared with the other borders of views.

    One column of a picture says little: the ratio over 96 panoramas is known to some 0.08.
    """
    closed, open_ = (
        closure(list(pictures(sampler, 96, True)), STRIDE),
        closure(list(pictures(sampler, 16, False)), STRIDE),
    )
    print(f"closed {closed:.2f}, open {open_:.2f}")
    assert closed <= 1.1
    assert open_ > 3


def test_closure_sees_a_seam():
    chance = np.random.default_rng(0)
    smooth = np.cumsum(chance.normal(size=(8, 64, 3)), axis=1)
    smooth -= np.linspace(0, 1, 64)[None, :, None] * (smooth[:, -1:] - smooth[:, :1])  # ends where it began
    assert closure([smooth], 8) < 2
    assert closure([smooth + np.arange(64)[None, :, None]], 8) > 10
