"""`madgen sample` from pictures: the panoramas are those of Python, and wrong pictures are refused."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from madgen import PanoramaSampler

SEED = ("--seed", "7", "-o", "panorama.png")


def picture(height=32, width=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def sample(madgen_here, job_file, tmp_path):
    """Run `madgen sample` with the tiny backbone, a picture and the mask of its left half."""
    picture().save(tmp_path / "image.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")

    def run(*arguments):
        return madgen_here(
            "sample", "hills", "--job", job_file, "sampling.num_inference_steps=4", "backbone.dtype=float32", *arguments
        )

    return run


@pytest.fixture(scope="module")
def sampler(tiny):
    return PanoramaSampler.from_pretrained(tiny, mad_steps=1, dtype="float32", overrides=["sampling.init.feather=4"])


def result(tmp_path, name="panorama.png"):
    return np.asarray(Image.open(tmp_path / name))


def expected(sampler, **run):
    run = {"num_inference_steps": 4, "guidance_scale": 2.0, "seeds": [7], **run}
    return sampler.sample(["hills"], **run)[0]


def test_image_is_redrawn_at_its_own_size(sample, sampler, tmp_path):
    made = sample("--image", "image.png", "--strength", "0.5", *SEED)
    assert made.code == 0, made.err
    assert np.array_equal(result(tmp_path), expected(sampler, images=[picture()], strength=0.5))
    recorded = json.loads(Image.open(tmp_path / "panorama.png").text["parameters"])
    assert recorded["pictures"] == {"image": hashlib.sha256((tmp_path / "image.png").read_bytes()).hexdigest()}
    assert (recorded["sampling"]["init"]["strength"], recorded["sampling"]["width"]) == (0.5, 64)
    made = sample("--image", "image.png", *SEED, "-n", "2")
    assert made.code == 0, made.err
    assert np.array_equal(result(tmp_path, "panorama-1.png"), expected(sampler, images=[picture()], strength=0.8))
    assert np.array_equal(
        result(tmp_path, "panorama-2.png"), expected(sampler, images=[picture()], strength=0.8, seeds=[8])
    )


def test_scale_enlarges_the_image(sample, sampler, tmp_path):
    made = sample("--image", "image.png", "--strength", "0.5", "--scale", "1.5", *SEED)
    assert made.code == 0, made.err
    assert np.array_equal(result(tmp_path), expected(sampler, images=[picture()], strength=0.5, height=48, width=96))
    made = sample("--image", "image.png", "--strength", "0.5", "sampling.height=48", "sampling.width=96", *SEED)
    assert made.code == 0, made.err
    assert result(tmp_path).shape == (48, 96, 3)


def test_mask_and_place_keep_a_part(sample, sampler, tmp_path):
    made = sample("--image", "image.png", "--mask", "mask.png", "sampling.init.feather=4", *SEED)
    assert made.code == 0, made.err
    known = np.zeros((32, 64), bool)
    known[:, :32] = True
    assert np.array_equal(result(tmp_path), expected(sampler, images=[picture()], masks=[known], strength=1))
    wide = ("sampling.width=128", "sampling.init.feather=0", *SEED)
    for place, left in (("16,0", 16), ("[16, 0]", 16), ("center", 32)):
        made = sample("--image", "image.png", "--place", place, *wide)
        assert made.code == 0, made.err
        assert result(tmp_path).shape == (32, 128, 3)
        assert np.array_equal(result(tmp_path)[:, left : left + 64], np.asarray(picture()))


BAD = [
    (["--image", "nowhere.png"], "madgen: image file nowhere.png does not exist"),
    (["--image", "."], "image file . is a directory"),
    (["--image", "text.txt"], "text.txt: it is not a picture"),
    (["--image", "empty.png"], "image file empty.png is empty"),
    (["--image", "https://127.0.0.1:9/a.png"], "https://127.0.0.1:9/a.png cannot be reached"),
    (["--image", "image.png", "--mask", "small.png"], "the mask of 16x16 px"),
    (["--mask", "mask.png"], "--mask has no effect without --image"),
    (["--strength", "0.5"], "--strength has no effect without --image"),
    (["--image", "image.png", "--strength", "1.5"], "sampling.init.strength must be in 0..1 or null, got 1.5"),
    (["--image", "image.png", "--strength", "0.1"], "is less than one step; raise it to 0.25"),
    (["--image", "image.png", "--scale", "0"], "sampling.init.scale must be a finite number > 0"),
    (["--image", "image.png", "--scale", "1.1"], "cannot be covered by views"),
    (["--image", "image.png", "--place", "left"], "--place must be LEFT,TOP in pixels >= 0, or center, got 'left'"),
    (["--image", "image.png", "--place", "100,0", "sampling.width=128"], "is not inside the panorama"),
    (["--image", "image.png", "sampling.width=128"], "another aspect ratio than the panorama of 32x128 px"),
    (["--control", "image.png"], "--control has no effect without backbone.controlnet.weights"),
    (["--style", "image.png"], "--style has no effect without backbone.ip_adapter.weights"),
    (["sampling.init.strength=0.5"], "sampling.init.strength starts from a picture: name it with --image"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_wrong_pictures_are_refused_and_nothing_written(sample, tmp_path, arguments, message):
    (tmp_path / "text.txt").write_text("no picture", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    Image.new("L", (16, 16), 255).save(tmp_path / "small.png")
    refused = sample(*arguments, *SEED)
    assert (refused.code, message in refused.err) == (2, True), refused.err
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "panorama.png").exists()
