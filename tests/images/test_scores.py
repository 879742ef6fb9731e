"""Scores of synthetic images with known exact values."""

from itertools import combinations

import numpy as np
import pytest

from madgen.config.schema import PIXEL_SCORES
from madgen.diffusion.views import Axis
from madgen.images.scores import BANDS, coherence, pixel_scores, seam, wrap

CELL = 8


def picture(columns, height=16):
    """Return an image whose rows are all `columns`, in all three channels."""
    return np.repeat(np.tile(np.asarray(columns, np.uint8), (height, 1))[..., None], 3, axis=2)


def step(low=100, high=130, at=32, width=64):
    return picture([low] * at + [high] * (width - at))


RAMP = np.arange(64) * 2  # from half a cell to the next the mean rises by 8


@pytest.mark.parametrize(
    ("image", "borders", "expected"),
    [
        (step(), [32], 31.0),
        (step()[:, ::-1], [32], 31.0),
        (step(100, 100), [32], 1.0),
        (picture(RAMP), [32], 1.0),
        (picture(RAMP + 10 * (np.arange(64) >= 32)), [32], 19 / 9),
        (
            picture(RAMP + 10 * (np.arange(64) >= 32)),
            [16],
            9 / (1 + (8 + 8 + 18) / 3),
        ),  # cells 1, 3 and 4 are beside it
        (step(), [16, 32], (1 + 15) / 1),  # of two borders one has a step
        (step(), [48], 1 / (1 + 30 / 3)),
        (step(at=33), [32], 1 + 30 * 3 / 4),  # three of the four columns of the half cell after it
    ],
)
def test_seam_compares_steps_at_borders_with_those_beside_them(image, borders, expected):
    assert seam(image, [], borders, CELL) == pytest.approx(expected, abs=1e-12)
    assert seam(image.swapaxes(0, 1), borders, [], CELL) == pytest.approx(expected, abs=1e-12)


def test_seam_averages_channels_and_takes_the_larger_direction():
    red = step()
    red[..., 1:] = 100
    assert seam(red, [], [32], CELL) == 11.0
    both = np.repeat(step(), 4, axis=0)
    both[32:] += 60
    assert seam(both, [], [32], CELL) == 31.0
    assert seam(both, [32], [32], CELL) == 61.0
    assert seam(both, [16], [32], CELL) == 31.0


def test_texture_within_a_cell_does_not_change_seam():
    """The noise has the same mean in each half cell."""
    rng = np.random.default_rng(0)
    flat = np.full((16, 16, 3, 4), 100) + rng.permuted(np.tile([-50, 50, -20, 20], (16, 16, 3, 1)), axis=3)
    image = flat.transpose(0, 1, 3, 2).reshape(16, 64, 3).astype(np.uint8)
    assert np.abs(np.diff(image.astype(int), axis=1)).mean() > 20
    assert seam(image, [], [32], CELL) == 1.0


def test_seam_is_none_without_borders_or_steps_beside_them():
    assert seam(step(), [], [], CELL) is None
    assert seam(step(), [], [0, 64], CELL) is None
    assert seam(step(), [], list(range(8, 64, 8)), CELL) is None
    assert seam(step()[:, 28:36], [], [4], CELL) is None


def test_wrap_compares_the_edge_with_steps_beside_it():
    halves = step(50, 90)
    assert wrap(halves, CELL) == 41.0
    assert wrap(halves[:, ::-1], CELL) == 41.0
    assert wrap(step(50, 50), CELL) == 1.0
    assert wrap(np.roll(halves, 32, axis=1), CELL) == 41.0, "both steps are alike"
    assert wrap(np.roll(halves, 8, axis=1), CELL) == pytest.approx(1 / 11)
    assert wrap(np.roll(halves, 16, axis=1), CELL) == pytest.approx(1 / 21), "steps on both sides"
    assert wrap(np.roll(step(50, 90, 64, 128), 32, axis=1), CELL) == 1.0, "they are four cells away"
    one_row = picture([0] * 64, 64)
    one_row[:8, 32:] = 80
    assert wrap(one_row, CELL) == 11.0


def test_wrap_of_a_narrow_image_is_none():
    assert wrap(step()[:, :8], CELL) is None
    assert wrap(step()[:, 16:48], CELL) == 31.0, "two cells on each side"


def test_coherence_of_known_images():
    assert coherence(step(0, 0)) == 1.0
    assert coherence(picture([0] * 32 + [255] * 32, 32)) == pytest.approx(1 / (1 + 255 / 32))
    upper = picture([0] * 64, 32)
    upper[:16, 32:] = 64
    assert coherence(upper) == 0.5, "half the bands differ by 64"
    assert coherence(upper[::-1]) == coherence(upper[:, ::-1]) == coherence(upper.swapaxes(0, 1)) == 0.5
    one = picture([0] * 96 + [64] * 32, 32)
    assert coherence(one) == 0.5, "three of six pairs of crops differ by 64"
    red = picture([0] * 64, 32)
    red[:, 32:, 0] = 96
    assert coherence(red) == 0.5, "one of three channels differs by 96"


def test_coherence_ignores_positions_within_a_band():
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shuffled = crop[:, rng.permutation(32)]
    assert coherence(np.concatenate([crop, shuffled], axis=1)) == 1.0
    assert coherence(np.concatenate([crop, crop[::-1]], axis=1)) < 1.0
    sky_above = picture([200] * 128, 32)
    sky_above[16:] = 50
    upside_down = sky_above.copy()
    upside_down[:, 64:] = sky_above[::-1, 64:]
    assert coherence(sky_above) == 1.0
    assert coherence(upside_down) < 0.3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 63), (33, 100), (24, 217), (90, 41), (16, 16), (40, 200)])
def test_coherence_equals_a_naive_implementation(height, width):
    """The reference loops over pairs and uses sorted values instead of histograms."""
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = (image * np.linspace(0.3, 1, width)[:, None]).astype(np.uint8)
    wide = image if width >= height else image.swapaxes(0, 1)
    short, long = wide.shape[:2]
    side = min(short, long // 2)
    count, top = long // side, (short - side) // 2
    crops = [wide[top : top + side, (i * (long - side)) // (count - 1) :][:, :side] for i in range(count)]
    found = []
    for one, other in combinations(crops, 2):
        for band in range(BANDS):
            rows = slice(band * side // BANDS, (band + 1) * side // BANDS)
            sorted_values = [np.sort(crop[rows].reshape(-1, 3).astype(float), axis=0) for crop in (one, other)]
            found.append(np.abs(sorted_values[0] - sorted_values[1]).mean())
    assert coherence(image) == pytest.approx(1 / (1 + np.mean(found) / 32), rel=1e-12)
    assert 0 < coherence(image) < 1


def test_coherence_of_a_long_image_needs_little_memory():
    image = np.zeros((64, 2**17, 3), np.uint8)
    image[:, -64:] = 64
    assert coherence(image) == pytest.approx(1 / (1 + 64 * 2047 / (2048 * 2047 / 2) / 32))


def test_coherence_is_none_for_small_images():
    assert coherence(np.zeros((4, 100, 3), np.uint8)) is None


def test_scores_are_rounded_and_undefined_ones_omitted():
    image = picture(RAMP + 10 * (np.arange(64) >= 32))
    found = pixel_scores(PIXEL_SCORES, image, [], [32], CELL)
    assert list(found) == ["seam", "wrap", "coherence"]
    assert found["seam"] == 2.1111
    assert pixel_scores(["seam", "coherence"], image, [], [], CELL) == {"coherence": found["coherence"]}
    assert pixel_scores([], image, [], [32], CELL) == {}


@pytest.mark.parametrize(
    ("axis", "borders"),
    [
        (Axis(12, 6, (0, 3, 6)), [3, 6, 9]),
        (Axis(12, 5, (0, 3, 7)), [3, 5, 7, 8]),
        (Axis(12, 12, (0,)), []),
        (Axis(12, 6, (0, 4, 8)), [2, 4, 6, 8, 10]),  # the last one wraps
        (Axis(8, 4, (2, 6)), [2, 6]),
    ],
)
def test_borders_of_views_are_inside_the_canvas(axis, borders):
    assert axis.borders == borders
