"""Metadata of encoded images is replaced as if the image had been encoded with it."""

import numpy as np
import pytest

from madgen.dataset.encoding import encode_image
from madgen.images.embedded_metadata import with_metadata

IMAGE = np.random.default_rng(0).integers(0, 255, (16, 48, 3), dtype=np.uint8)


def about(key, prompt="a lake é <&>", loop=False):
    return {"key": key, "prompt": prompt, "height": 16, "width": 48, "sampling": {"loop": loop}}


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("key", ["a-0000", "b-a-0000", "odd-a-0000"])
def test_bytes_are_those_of_an_image_encoded_with_the_metadata(image_format, loop, key):
    old = encode_image(IMAGE, image_format, 90, loop, about("a-0000", loop=loop))
    new = encode_image(IMAGE, image_format, 90, loop, about(key, loop=loop))
    assert with_metadata(old, image_format, about(key, loop=loop)) == new


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_images_without_metadata_stay_as_they_are(image_format):
    data = encode_image(IMAGE, image_format, 90)
    assert with_metadata(data, image_format, about("b-0000")) == data


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_other_files_are_refused(image_format):
    with pytest.raises(ValueError, match=r"no (PNG|JPEG|WebP) file"):
        with_metadata(b"not an image", image_format, about("b-0000"))
