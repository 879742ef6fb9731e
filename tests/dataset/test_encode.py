import io
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from madgen.dataset.encode import encode_image

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 64, 3), dtype=np.uint8)


def decode(data):
    image = Image.open(io.BytesIO(data))
    return np.asarray(image.convert("RGB")), image.info.get("xmp")


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_a_panorama_that_closes_says_so_and_no_other(image_format):
    pixels, nothing = decode(encode_image(PIXELS, image_format, 95))
    looped, xmp = decode(encode_image(PIXELS, image_format, 95, loop=True))
    assert np.array_equal(pixels, looped)
    assert nothing is None
    (description,) = xml.etree.ElementTree.fromstring(xmp)[0]
    said = {name.rpartition("}")[2]: value for name, value in description.attrib.items()}
    assert said["ProjectionType"] == "cylindrical"
    assert (said["FullPanoWidthPixels"], said["CroppedAreaImageHeightPixels"]) == ("64", "16")


def test_png_is_lossless_and_the_same_bytes_each_time():
    data = encode_image(PIXELS, "png", 95, loop=True)
    assert np.array_equal(decode(data)[0], PIXELS)
    assert data == encode_image(PIXELS, "png", 95, loop=True)


@pytest.mark.parametrize("quality", [50, 90, 95, 100])
@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
def test_pictures_that_hardly_compress_are_written(image_format, quality):
    """Noise is the largest that a picture can be."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 768, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_image(noise, image_format, quality))) as image:
        image.load()
        assert image.size == (768, 128)
