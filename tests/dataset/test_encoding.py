import io
import json
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from madgen.dataset.encoding import encode_image

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 64, 3), dtype=np.uint8)


def decode(data):
    image = Image.open(io.BytesIO(data))
    return np.asarray(image.convert("RGB")), image.info.get("xmp")


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_only_looped_panoramas_are_marked_as_360(image_format):
    pixels, nothing = decode(encode_image(PIXELS, image_format, 95))
    looped, xmp = decode(encode_image(PIXELS, image_format, 95, loop=True))
    assert np.array_equal(pixels, looped)
    assert nothing is None
    (description,) = xml.etree.ElementTree.fromstring(xmp)[0]
    said = {name.rpartition("}")[2]: value for name, value in description.attrib.items()}
    assert said["ProjectionType"] == "cylindrical"
    assert (said["FullPanoWidthPixels"], said["CroppedAreaImageHeightPixels"]) == ("64", "16")


HOSTILE = [
    "a plain one",
    "\x00\x1b[31m \x85 \ufffe ]]> <script> & \"quoted\" 'too' </rdf:RDF>",
    "Alpen 🏔️ в тумане 雪山",
    "long & <long> 雪 " * 10_000,
]


def embedded(data):
    """The parameters and the prompt that a picture file carries, and all its XMP attributes."""
    image = Image.open(io.BytesIO(data))
    image.load()
    said, prompt = {}, None
    if xmp := image.info.get("xmp"):
        (description,) = xml.etree.ElementTree.fromstring(xmp)[0]
        said = {name.rpartition("}")[2]: value for name, value in description.attrib.items()}
        prompt = "".join(description.itertext())
    if image.format == "PNG":
        return image.text["parameters"], image.text["Description"], said
    return said["parameters"], prompt, said


@pytest.mark.parametrize("prompt", HOSTILE, ids=["plain", "markup", "unicode", "long"])
@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_images_embed_their_parameters_for_any_prompt(image_format, prompt):
    about = {
        "key": "p-0000", "seed": 2**48 - 1, "prompt": prompt, "fingerprint": "f" * 32, "method": {"mad": {"steps": 15}},
        "sampling": {"loop": True, "guidance_scale": 7.5}, "regions": [{"mask": "x" * 90_000, "prompt": prompt}],
    }  # fmt: skip
    data = encode_image(PIXELS, image_format, 95, True, about)
    assert data == encode_image(PIXELS, image_format, 95, True, dict(reversed(about.items())))
    assert np.array_equal(decode(data)[0], decode(encode_image(PIXELS, image_format, 95))[0])
    parameters, told, xmp = embedded(data)
    found = json.loads(parameters)
    assert xmp["ProjectionType"] == "cylindrical"
    assert all(found[name] == about[name] for name in ("key", "seed", "fingerprint", "sampling", "method"))
    assert found["prompt"].rstrip("…") == prompt[: len(found["prompt"].rstrip("…"))]
    assert len(found["prompt"]) >= min(len(prompt), 2000)
    assert found["cut"] is True, "the mask alone is more than JPEG can hold"
    assert told.isprintable()
    assert told.startswith(" ".join(prompt.split())[:9]) or not prompt.isprintable()
    assert len(told) <= 1000
    del about["regions"]
    assert (json.loads(embedded(encode_image(PIXELS, image_format, 95, True, about))[0]) == about) == (
        len(prompt) < 50_000
    )


def test_png_is_lossless_and_the_same_bytes_each_time():
    data = encode_image(PIXELS, "png", 95, loop=True)
    assert np.array_equal(decode(data)[0], PIXELS)
    assert data == encode_image(PIXELS, "png", 95, loop=True)


@pytest.mark.parametrize("quality", [50, 90, 95, 100])
@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
def test_incompressible_images_are_written(image_format, quality):
    """Noise is the largest that a picture can be."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 768, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_image(noise, image_format, quality))) as image:
        image.load()
        assert image.size == (768, 128)
