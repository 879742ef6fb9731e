"""The scores of the study, on drawn scenes with known attributes."""

import coherence_scores as scores
import numpy as np
import pytest
from demo_backbone.scenes import HORIZONS, Scene, draw, random_scene


def drawn(count, seed=0):
    """Random scenes, their pictures and where their horizons were drawn (share of the rows)."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        scene = random_scene(rng)
        true = HORIZONS[scene.horizon] + np.random.default_rng(number).uniform(-0.025, 0.025)
        yield scene, draw(scene, np.random.default_rng(number)), true


def stitched(*scenes, seed=1):
    return np.concatenate([draw(scene, np.random.default_rng((seed, n))) for n, scene in enumerate(scenes)], axis=1)


def test_horizon_is_found_within_3_pixels():
    for scene, image, true in drawn(60):
        assert abs(scores.horizon(image) - true) * 128 <= 3, scene


@pytest.mark.slow
def test_spread_is_small_within_one_scene_and_large_across_scenes():
    noon, night = Scene("noon", "hills", "meadow", "low"), Scene("night", "hills", "snow", "high")
    one = scores.spread(draw(noon, np.random.default_rng(0), 128, 512))
    assert one["sky"] < 2
    assert one["ground"] < 5
    assert one["horizon"] < 1
    assert one["time"] == 0
    mixed = scores.spread(stitched(noon, night, noon, night))
    assert mixed["sky"] > 40
    assert mixed["ground"] > 10
    assert mixed["horizon"] > 12
    assert mixed["time"] == pytest.approx(100 * 4 / 6)  # pairs of six that differ


@pytest.mark.slow
def test_spread_of_stitched_pictures_of_one_scene_is_small():
    scene = Scene("sunset", "mountains", "sea", "middle")
    same = scores.spread(stitched(*4 * [scene]))
    assert same["sky"] < 3
    assert same["horizon"] < 3  # the drawn horizons differ by up to 5
    assert same["time"] == 0


@pytest.mark.slow
def test_vertical_pictures_are_cut_from_top_to_bottom():
    scene = Scene("noon", "dunes", "desert", "low")
    tall = np.concatenate([draw(scene, np.random.default_rng(0))] * 3)
    assert [crop.shape for crop in scores.crops(tall)] == [(128, 128, 3)] * 3
    assert scores.spread(tall) == {"sky": 0, "ground": 0, "horizon": 0, "time": 0}


@pytest.mark.slow
def test_caption_match_counts_named_attributes():
    image = stitched(Scene("noon", "hills", "meadow", "low"), Scene("night", "hills", "meadow", "low"))
    assert scores.caption_match(image, {"ground": "meadow"}) == 100
    assert scores.caption_match(image, {"time": "night"}) == 50
    assert scores.caption_match(image, {"time": "night", "ground": "meadow"}) == 75
    assert scores.caption_match(image, {}) is None


def test_variety_is_the_spread_between_panoramas():
    scene = Scene("noon", "hills", "meadow", "low")
    one = scores.summary(stitched(scene, scene))
    assert scores.variety([one, one, one]) == {"colour": 0, "horizon": 0}
    other = scores.summary(stitched(*2 * [Scene("night", "hills", "snow", "high")]))
    assert scores.variety([one, other])["colour"] > 40
    assert scores.variety([one, other])["horizon"] > 15


def test_seam_score_rises_only_at_borders():
    image = draw(Scene("noon", "hills", "meadow", "low"), np.random.default_rng(0), 128, 512).astype(float)
    borders, elsewhere = range(32, 512, 32), range(48, 512, 32)
    assert 0.75 < scores.seam(image, borders) < 1.35
    stripes = image + (np.arange(512) // 32 % 2 * 6.0)[None, :, None]  # every second stripe is a little brighter
    assert scores.seam(stripes, borders) > 2 * scores.seam(image, borders)
    assert scores.seam(stripes, elsewhere) < scores.seam(image, elsewhere)
    assert scores.seam(stripes.transpose(1, 0, 2), borders) == pytest.approx(scores.seam(stripes, borders))


def test_wrap_ratio_of_a_closed_panorama_is_one():
    x = np.arange(256)
    wave = np.broadcast_to(127 + 100 * np.sin(2 * np.pi * x / 256)[None, :, None], (128, 256, 3))
    assert scores.wrap_ratio(wave) == pytest.approx(1, abs=0.6)
    ramp = np.broadcast_to(x[None, :, None].astype(float), (128, 256, 3))
    assert scores.wrap_ratio(ramp) == 255
