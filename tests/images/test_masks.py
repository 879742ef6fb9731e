import numpy as np
import pytest
from PIL import Image

from madgen import UserError
from madgen.images.masks import cell_weights, embed_mask
from madgen.types import Box, MaskFile, Ramp, Region


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((32, 64), np.uint8)
    pixels[8:24, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return MaskFile(str(tmp_path / "mask.png"))


def test_box_aligned_to_cells_has_binary_weights():
    weights = cell_weights(Box(8, 0, 24, 16), 32, 64, 8)
    assert weights.shape == (4, 8)
    expected = np.zeros((4, 8))
    expected[:2, 1:3] = 1
    assert np.array_equal(weights, expected)


def test_box_weights_are_covered_shares_of_cells():
    weights = cell_weights(Box(4, 0, 10, 32), 32, 64, 8)
    assert weights[0].tolist() == [0.5, 0.25, 0, 0, 0, 0, 0, 0]


def test_mask_image_of_a_box_equals_the_box(picture):
    assert np.array_equal(cell_weights(picture, 32, 64, 8), cell_weights(Box(16, 8, 32, 24), 32, 64, 8))
    assert np.array_equal(cell_weights(picture, 64, 128, 8), cell_weights(Box(32, 16, 64, 48), 64, 128, 8))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("loop", [True, False])
def test_ramps_sum_to_one(count, loop):
    total = sum(cell_weights(Ramp(index, count), 16, 96, 4, loop) for index in range(count))
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_ramps_span_the_width_and_wrap_on_a_loop():
    first, last = (cell_weights(Ramp(index, 3), 8, 64, 8)[0] for index in (0, 2))
    assert first.argmax() == 0
    assert last.argmax() == 7
    assert first[7] == last[0] == 0
    looped = cell_weights(Ramp(0, 4), 8, 64, 8, loop=True)[0]
    np.testing.assert_allclose(looped, looped[::-1])


def test_embedded_region_round_trips_through_json(picture):
    for mask in (picture, Box(1, 2, 30, 40), Ramp(1, 3)):
        region = Region(mask, "a hut", "fog")
        recorded = embed_mask(region).as_dict()
        again = Region.from_dict(recorded)
        assert (again.text, again.negative) == ("a hut", "fog")
        assert np.array_equal(cell_weights(again.mask, 64, 128, 8), cell_weights(mask, 64, 128, 8))
        assert again.as_dict() == recorded


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Box(8, 0, 8, 8), "need 0 <= 8 < 8 <= 64 px"),
        (Box(8, 0, 80, 8), "need 0 <= 8 < 80 <= 64 px"),
        (Box(-1, 0, 8, 8), "need 0 <= -1 < 8 <= 64 px"),
        (Box(0, 0, 8, 40), "need 0 <= 0 < 40 <= 32 px"),
    ],
)
def test_box_outside_the_panorama_is_refused(mask, message):
    with pytest.raises(UserError, match=message):
        cell_weights(mask, 32, 64, 8)


def test_mask_images_of_another_shape_are_refused(picture, tmp_path):
    with pytest.raises(UserError, match="another aspect ratio than the panorama of 32x128 px"):
        cell_weights(picture, 32, 128, 8)
    Image.new("L", (64, 32)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="covers no part of 32x64 px"):
        cell_weights(MaskFile(str(tmp_path / "black.png"), ""), 32, 64, 8)
    (tmp_path / "broken.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(UserError, match="cannot read the mask"):
        cell_weights(MaskFile(str(tmp_path / "broken.png"), ""), 32, 64, 8)


def test_transparency_is_black_and_16_bits_are_refused(tmp_path):
    image = Image.new("RGBA", (64, 32), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 32))
    image.save(tmp_path / "clear.png")
    expected = cell_weights(Box(0, 0, 32, 32), 32, 64, 8)
    assert np.array_equal(cell_weights(MaskFile(str(tmp_path / "clear.png")), 32, 64, 8), expected)
    Image.fromarray(np.full((32, 64), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        cell_weights(MaskFile(str(tmp_path / "deep.png")), 32, 64, 8)


def test_changed_mask_file_is_refused(picture):
    with pytest.raises(UserError, match="has changed since the job was planned"):
        cell_weights(MaskFile(picture.path, "0" * 64), 32, 64, 8)
