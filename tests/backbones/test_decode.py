"""Tiled decoding: a canvas of any size in tiles of at most two views, blended."""

import itertools

import numpy as np
import pytest
import torch
from demo_backbone.scenes import Scene, draw

import madgen.sampling.postprocess
from madgen import PanoramaSampler, UserError
from madgen.backbones._vae import _faded, tile_starts


@pytest.fixture(scope="module")
def demo():
    return PanoramaSampler.from_pretrained("demo", dtype="float32", layout="shifted", mad_steps=8)


@pytest.fixture(scope="module")
def latents(demo):
    """Encode a drawn landscape, two views high and seven wide: [1, 4, 32, 112]."""
    scene = draw(Scene("noon", "mountains", "meadow", "middle"), np.random.default_rng(3), 256, 896)
    with torch.no_grad():
        return demo.backbone.encode(torch.from_numpy(scene).permute(2, 0, 1)[None] / 255)


@pytest.mark.parametrize("tile", [4, 32, 128, 256])
def test_tiles_have_one_size_cover_the_canvas_and_blend(tile):
    for extent in range(tile, tile * 9, max(1, tile // 16)):
        starts = tile_starts(extent, tile)
        strides = [after - before for before, after in itertools.pairwise(starts)]
        assert (starts[0], starts[-1] + tile) == (0, extent)
        assert all(0 < stride <= tile - tile // 4 for stride in strides)
        weights = torch.zeros(extent * 2)
        for start, weight in _faded(extent, tile, 2):
            weights[start * 2 : (start + tile) * 2] += weight
        torch.testing.assert_close(weights, torch.ones(extent * 2))


@pytest.mark.slow
def test_tiled_and_whole_decoding_differ_little(demo, latents):
    whole, tiled = (demo.backbone.decode(latents, 0, mode) for mode in (False, True))
    difference = (whole - tiled).abs()
    assert 0 < float(difference.mean()) < 0.006
    assert float(difference.max()) < 0.05


@pytest.mark.slow
def test_tile_borders_show_no_step(demo, latents):
    """In the difference to the whole picture no column or row steps up from its neighbour by more than 1/2 of 255."""
    whole, tiled = (demo.backbone.decode(latents, 0, mode) for mode in (False, True))
    difference = (tiled - whole).mean(dim=(0, 1))
    for direction in (0, 1):
        steps = difference.diff(dim=direction).mean(dim=1 - direction).abs()
        assert float(steps.max()) < 0.5 / 255


@pytest.mark.parametrize("tiled", [False, True])
def test_looped_decoding_wraps_with_tiles(demo, latents, tiled):
    """Decoding a turned panorama is turning the decoded one."""
    turned = demo.backbone.decode(latents.roll(40, -1), 16, tiled)
    errors = (turned - demo.backbone.decode(latents, 16, tiled).roll(40 * 8, -1)).abs()
    assert turned.shape == (1, 3, 256, 896)
    assert float(errors.mean()) < 0.01


@pytest.mark.slow
def test_auto_depends_on_the_size_only(demo, latents, monkeypatch):
    assert np.array_equal(demo.decode(latents), demo.decode(latents, decode="whole"))
    monkeypatch.setattr(madgen.sampling.postprocess, "MAX_UNTILED_PIXELS", 256 * 896)
    assert np.array_equal(demo.decode(latents), demo.decode(latents, decode="whole"))
    monkeypatch.setattr(madgen.sampling.postprocess, "MAX_UNTILED_PIXELS", 256 * 896 - 1)
    assert np.array_equal(demo.decode(latents), demo.decode(latents, decode="tiled"))
    assert np.array_equal(demo.decode(latents, loop=True), demo.decode(latents, loop=True, decode="tiled"))


def test_unknown_mode_is_refused(demo, latents):
    with pytest.raises(UserError, match="decode must be one of auto, whole, tiled, got 'fast'"):
        demo.decode(latents, decode="fast")


def test_memory_of_a_tiled_pass_does_not_grow_with_the_canvas(demo, latents, monkeypatch):
    seen = []
    forward = demo.backbone.vae.decoder.forward
    monkeypatch.setattr(demo.backbone.vae.decoder, "forward", lambda z, *a, **k: seen.append(z.shape) or forward(z))
    demo.decode(torch.cat([latents, latents], dim=-1), decode="tiled")
    assert max(max(shape[-2:]) for shape in seen) <= 2 * demo.backbone.spec.view_size
