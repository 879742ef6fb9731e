"""`sampler(prompt, image=..., mask_image=..., strength=...)` as diffusers' image-to-image and inpainting pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from madgen import PanoramaSampler, UserError

PROMPT, RUN = "a photo of a hill", {"num_inference_steps": 10, "guidance_scale": 3.0}
SMALL = {"num_inference_steps": 4, "guidance_scale": 2.0}


def picture(height=48, width=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def redrawn(height=48, width=64, first=32):
    """Return a mask as in diffusers: white, to be redrawn, from the column `first` on."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, first:] = 255
    return Image.fromarray(mask)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def quiet(caller):
    caller.set_progress_bar_config(disable=True)
    return caller


@pytest.fixture(scope="module")
def whole(tiny):
    return quiet(PanoramaSampler.from_pretrained(tiny, layout="whole", mad_steps=0, dtype="float32"))


@pytest.fixture(scope="module")
def sampler(tiny):
    return quiet(PanoramaSampler.from_pretrained(tiny, stride=4, mad_steps=1, dtype="float32"))


def encoded(sampler, image):
    with torch.no_grad():
        return sampler.backbone.encode(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)


@pytest.mark.parametrize("strength", [0.35, None])
def test_call_equals_the_image_to_image_pipeline_and_its_default_strength(tiny, whole, strength):
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tiny))
    run = {**RUN, "output_type": "latent", **({} if strength is None else {"strength": strength})}
    reference = pipe(PROMPT, image=encoded(whole, picture()), generator=seeded(), **run).images
    assert error(whole(PROMPT, image=picture(), generator=seeded(), **run).images, reference) <= 1e-5


def test_mask_image_is_redrawn_where_it_is_white_as_in_the_inpainting_pipeline(tiny, whole):
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline.from_pretrained(tiny))
    pipe._encode_vae_image = lambda *_, **__: encoded(whole, picture())  # the mean, without random numbers
    run = {**RUN, "image": picture(), "mask_image": redrawn(), "output_type": "latent"}
    reference = pipe(PROMPT, generator=seeded(), strength=1.0, height=48, width=64, **run).images
    assert error(whole(PROMPT, generator=seeded(), **run).images, reference) <= 1e-5


def test_black_part_of_the_mask_is_the_image(tiny):
    sampler = quiet(PanoramaSampler.from_pretrained(tiny, stride=4, overrides=["sampling.init.feather=4"]))
    (image,) = sampler(PROMPT, image=picture(), mask_image=redrawn(), generator=seeded(), **SMALL).images
    assert np.array_equal(np.asarray(image)[:, :28], np.asarray(picture())[:, :28])
    assert not np.array_equal(np.asarray(image)[:, 32:], np.asarray(picture())[:, 32:])


def test_call_equals_sample_whatever_pictures_are_passed_as(sampler, tmp_path):
    known = np.asarray(redrawn()) == 0
    expected = sampler.sample([PROMPT], images=[picture()], masks=[known], strength=0.5, seeds=[7], **SMALL)[0]
    picture().save(tmp_path / "image.png")
    redrawn().save(tmp_path / "mask.png")
    for image, mask in (
        (picture(), redrawn()),
        (np.asarray(picture()), ~known),
        (tmp_path / "image.png", str(tmp_path / "mask.png")),
        ([picture()], [redrawn()]),
    ):
        run = {"image": image, "mask_image": mask, "strength": 0.5, "generator": seeded(), **SMALL}
        assert np.array_equal(np.asarray(sampler(PROMPT, **run).images[0]), expected)
    from_path = sampler.sample(
        [PROMPT], images=[tmp_path / "image.png"], masks=[known], strength=0.5, seeds=[7], **SMALL
    )
    assert np.array_equal(from_path[0], expected)


def test_one_picture_serves_all_prompts_and_lists_have_one_for_each(sampler):
    run = {"prompt": ["a hill", "the sea"], "strength": 0.5, "num_images_per_prompt": 2, "output_type": "np", **SMALL}
    generators = [seeded(seed) for seed in range(4)]
    shared = sampler(image=picture(), generator=generators, **run).images
    generators = [seeded(seed) for seed in range(4)]
    listed = sampler(image=[picture(), picture()], generator=generators, **run).images
    assert np.array_equal(shared, listed)
    assert len(shared) == 4
    with pytest.raises(UserError, match="image must be a list of one picture for each of 2 panoramas, got 3"):
        sampler(image=[picture()] * 3, **run)


def test_default_size_is_that_of_the_enlarged_image(tiny):
    sampler = quiet(PanoramaSampler.from_pretrained(tiny, stride=4, overrides=["sampling.init.scale=2"]))
    (image,) = sampler(PROMPT, image=picture(24, 40), strength=0.5, **SMALL).images
    assert (image.height, image.width) == (48, 80)


def test_progress_counts_the_steps_that_run(tiny, capsys):
    sampler = PanoramaSampler.from_pretrained(tiny, stride=4)
    sampler(PROMPT, image=picture(), strength=0.5, **SMALL)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": redrawn()}, "mask_image needs an image"),
        ({"strength": 0.5}, r"strength=0\.5 \(sampling\.init\.strength\) needs images"),
        ({"image": picture(), "strength": 1.5}, r"strength must be in 0\.\.1 or null, got 1\.5"),
        (
            {"image": torch.zeros(1, 3, 48, 64)},
            r"or paths of files, got an item torch.float32 \[1, 3, 48, 64\]$",
        ),
        ({"image": np.zeros((48, 64, 3))}, r"got an item float64 \[48, 64, 3\]"),
        ({"image": np.zeros((0, 64, 3), np.uint8)}, r"got an item uint8 \[0, 64, 3\]"),
        ({"image": "nowhere.png"}, "image: cannot read nowhere.png: No such file"),
        ({"image": picture(), "mask_image": redrawn(first=64)}, "the mask keeps everything"),
        ({"image": picture(), "mask_image": redrawn(first=0)}, "the mask keeps nothing"),
        (
            {"image": picture(), "mask_image": redrawn(24, 24)},
            "the mask of 24x24 px .* must have the size",
        ),
        ({"image": picture(), "mask_image": 3}, "mask_image must be PIL images"),
        ({"control_image": picture()}, "control has no effect: the backbone has no ControlNet"),
        ({"ip_adapter_image": picture()}, "style has no effect: the backbone has no IP-Adapter"),
        ({"images": [picture()]}, "images is not supported: use image=picture"),
        ({"control": [picture()]}, "control is not supported: use control_image=picture"),
        ({"padding_mask_crop": 8}, "padding_mask_crop is not supported: crop image and mask_image"),
    ],
)
def test_wrong_pictures_are_refused(sampler, arguments, message):
    with pytest.raises(UserError, match=message):
        sampler(PROMPT, **{"num_inference_steps": 4, "height": 48, "width": 64, **arguments})
