"""Looped panoramas have no seam: measured on images of the demo backbone."""

import numpy as np
import pytest
from coherence_scores import CELL, closure
from coherence_settings import PROMPTS

from madgen import PanoramaSampler

STRIDE, BATCH = 4 * CELL, 16  # px, panoramas


def pictures(sampler, count, loop, width, steps):
    size = {"height": 128, "width": width, "num_inference_steps": steps, "guidance_scale": 1.0, "loop": loop}
    for start in range(0, count, BATCH):
        yield from sampler.sample(list(PROMPTS), seeds=list(range(start, start + BATCH)), **size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "mad_steps", "width", "steps", "period"),
    [
        # The edge is a border of views, and is compared with the other borders of views.
        ("overlapping", 2, 192, 4, STRIDE),
        # No border of views is where it was: the edge is a border of latent cells, as there is one every 8 px.
        ("shifted", 4, 256, 6, CELL),
    ],
)
def test_the_step_across_the_edge_is_no_larger_than_elsewhere(layout, mad_steps, width, steps, period):
    """One column of a picture says little: the ratio over 48 panoramas is known to some 0.1."""
    sampler = PanoramaSampler.from_pretrained("demo", layout=layout, mad_steps=mad_steps, dtype="float32")
    closed, open_ = (
        closure(list(pictures(sampler, count, loop, width, steps)), period) for count, loop in ((48, True), (16, False))
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
