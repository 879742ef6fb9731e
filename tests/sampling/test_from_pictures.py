"""Laws of sampling from pictures: refining at a strength, and keeping a part."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from madgen import PanoramaSampler, UserError
from madgen.backbones import BackboneSpec, _vae

RUN = {"num_inference_steps": 4, "guidance_scale": 2.0, "seeds": [5]}
PROMPT = ["hills"]


def picture(height=48, width=96, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def sampler(tiny):
    return PanoramaSampler.from_pretrained(str(tiny), dtype="float32", stride=4, mad_steps=1)


def masked(columns, height=48, width=96):
    known = np.zeros((height, width), bool)
    known[:, columns] = True
    return known


def test_strength_zero_returns_the_picture_up_to_the_autoencoder(sampler):
    image = picture()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = sampler.decode(sampler.backbone.encode(pixels))
    assert np.array_equal(sampler.sample(PROMPT, images=[image], strength=0, **RUN), expected)


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LCM"])
def test_strength_one_equals_starting_from_noise(tiny, scheduler):
    sampler = PanoramaSampler.from_pretrained(
        str(tiny), dtype="float32", stride=4, mad_steps=1, scheduler=f"{scheduler}Scheduler"
    )
    started = sampler.sample(PROMPT, images=[picture()], strength=1, **RUN)
    assert np.array_equal(started, sampler.sample(PROMPT, height=48, width=96, **RUN))


def test_strength_orders_the_distance_to_the_picture(sampler):
    run = {**RUN, "num_inference_steps": 20}
    latents = [
        sampler.sample(PROMPT, images=[picture()], strength=strength, output="latent", **run)
        for strength in (0, 0.2, 0.5, 0.9)
    ]
    distances = [float((other - latents[0]).norm()) for other in latents[1:]]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_steps_are_counted_from_the_first_that_runs(sampler):
    steps = []
    run = {**RUN, "num_inference_steps": 10, "on_step": steps.append}
    sampler.sample(PROMPT, images=[picture()], strength=0.35, **run)
    assert steps == [0, 1, 2]


def test_images_are_resized_to_the_panorama(sampler):
    image = Image.fromarray(picture(24, 48))
    large = image.resize((96, 48), Image.Resampling.LANCZOS)
    expected = sampler.sample(PROMPT, images=[large], strength=0.5, **RUN)
    assert np.array_equal(sampler.sample(PROMPT, images=[image], height=48, width=96, strength=0.5, **RUN), expected)


def test_height_and_width_are_those_of_the_enlarged_image(tiny):
    sampler = PanoramaSampler.from_pretrained(
        str(tiny), dtype="float32", stride=4, mad_steps=1, overrides=["sampling.init={scale: 2, strength: 0.5}"]
    )
    image = picture(24, 48)
    result = sampler.sample(PROMPT, images=[image], **RUN)
    assert result.shape == (1, 48, 96, 3)
    assert np.array_equal(result, sampler.sample(PROMPT, images=[image], height=48, width=96, **RUN))


def test_placed_image_is_kept(tiny):
    overrides = ["sampling.init={strength: 1, place: center, feather: 0}"]
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", stride=4, mad_steps=1, overrides=overrides)
    image = picture(32, 40)
    (result,) = sampler.sample(PROMPT, images=[image], height=48, width=96, **RUN)
    assert np.array_equal(result[8:40, 28:68], image)
    with pytest.raises(UserError, match=r"the image of 64x40 px .* is not inside the panorama of 48x96 px; move it"):
        sampler.sample(PROMPT, images=[picture(64, 40)], height=48, width=96, **RUN)


@pytest.mark.parametrize("as_picture", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_known_part_is_the_picture_outside_the_feather(tiny, loop, as_picture):
    feather = 8
    sampler = PanoramaSampler.from_pretrained(
        str(tiny), dtype="float32", stride=4, mad_steps=1, overrides=[f"sampling.init.feather={feather}"]
    )
    image, known = picture(), masked(slice(20, 71))
    mask = Image.fromarray(known.astype(np.uint8) * 255) if as_picture else known
    (result,) = sampler.sample(PROMPT, images=[image], masks=[mask], strength=1, loop=loop, **RUN)
    assert np.array_equal(result[:, 20 + feather : 71 - feather], image[:, 20 + feather : 71 - feather])
    generated = sampler.sample(PROMPT, images=[image], masks=[mask], strength=1, loop=loop, output="latent", **RUN)
    decoded = sampler.decode(generated, loop=loop)[0]
    assert np.array_equal(result[:, :20], decoded[:, :20])
    assert np.array_equal(result[:, 71:], decoded[:, 71:])
    edge = result[:, 20 : 20 + feather].astype(int)
    low, high = (function(image, decoded)[:, 20 : 20 + feather] for function in (np.minimum, np.maximum))
    assert ((low <= edge) & (edge <= high)).all()


def test_feather_of_a_loop_reaches_across_the_edge(tiny):
    sampler = PanoramaSampler.from_pretrained(
        str(tiny), dtype="float32", stride=4, mad_steps=0, overrides=["sampling.init.feather=8"]
    )
    image, known = picture(), masked(slice(32, 96))
    run = {"images": [image], "masks": [known], "strength": 1, **RUN}
    assert np.array_equal(sampler.sample(PROMPT, **run)[0][:, 80:], image[:, 80:])
    looped = sampler.sample(PROMPT, loop=True, **run)[0]
    assert not np.array_equal(looped[:, 88:], image[:, 88:])  # the generated part continues at column 0
    assert np.array_equal(looped[:, 40:88], image[:, 40:88])


def test_generated_part_depends_on_the_known_one(sampler):
    results = [
        sampler.sample(PROMPT, images=[picture(seed=seed)], masks=[masked(slice(0, 48))], strength=1, **RUN)[0]
        for seed in (0, 1)
    ]
    assert not np.array_equal(results[0][:, 56:], results[1][:, 56:])


@pytest.mark.parametrize("known", [None, masked(slice(0, 48))])
def test_batches_and_chunks_do_not_matter(sampler, known):
    images = [picture(seed=seed) for seed in (0, 1)]
    run = {"num_inference_steps": 4, "guidance_scale": 2.0, "strength": 0.5}
    masks = [known] * 2 if known is not None else None
    together = sampler.sample(["hills", "sea"], images=images, masks=masks, seeds=[5, 6], output="pt", **run)
    chunked = sampler.sample(
        ["hills", "sea"], images=images, masks=masks, seeds=[5, 6], output="pt", chunk_views=2, **run
    )
    alone = [
        sampler.sample([text], images=[image], masks=masks and masks[:1], seeds=[seed], output="pt", **run)
        for text, image, seed in zip(["hills", "sea"], images, [5, 6], strict=True)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=2e-5)
    assert torch.allclose(together, chunked, atol=2e-5)


METHODS = [
    ["method.mad.steps=2"],
    ["method.views.layout=shifted", "method.mad.steps=1", "method.views.overlap_from=1"],
    ["method.merge.weights=gaussian", "method.mad.steps=1"],
    ["method.merge.operator=swap", "method.mad.steps=0"],
    ["method.noise.align=0.5", "method.mad.steps=0"],
    pytest.param(["method.sync={weight: 5, network: random, steps: 1}", "method.mad.steps=0"], marks=pytest.mark.slow),
    ["sampling.guidance_steps=[0,1]"],
]


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_every_method_starts_from_pictures(tiny, settings):
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", stride=4, overrides=settings)
    run = {**RUN, "guidance_scale": 3.0, "loop": True, "images": [picture()]}
    half = sampler.sample(PROMPT, strength=0.5, **run)
    assert half.std() > 0
    assert not np.array_equal(half, sampler.sample(PROMPT, strength=0.75, **run))
    kept = sampler.sample(PROMPT, strength=1, **{**run, "masks": [masked(slice(0, 64))]})
    assert kept.shape == (1, 48, 96, 3)


@dataclass(frozen=True)
class CellMeans:
    """An encoder that works cell by cell, at the cell's place in its token: tiles and wrapping change nothing."""

    spec: BackboneSpec

    def encode(self, pixels):
        means = functional.avg_pool2d(pixels, 4)[:, [0, 1, 2, 0]]
        means[..., :: self.spec.patch] *= 2
        return means


def test_tiles_and_wrapping_add_up(sampler):
    pixels = torch.rand(1, 3, 96, 264)
    for patch in (1, 2):
        backbone = CellMeans(replace(sampler.backbone.spec, patch=patch))
        plain = backbone.encode(pixels)
        for tile, wrap in ((8, 0), (16, 0), (None, 8), (16, 8), (64, 16)):
            assert torch.allclose(_vae.encode_canvas(backbone, pixels, wrap, tile), plain, atol=1e-6)


def test_loops_are_encoded_across_their_edge(sampler):
    """A loop that is turned by half its width has the same latents, turned; without `wrap` it has not."""
    pixels = torch.from_numpy(np.array(picture(32, 256))).permute(2, 0, 1)[None] / 255
    differences = []
    for wrap in (16, 0):
        with torch.no_grad():
            one, other = (_vae.encode_canvas(sampler.backbone, x, wrap) for x in (pixels, pixels.roll(128, -1)))
        edge = (one - other.roll(-32, -1))[..., [0, -1]]
        differences.append(float(edge.norm() / one[..., [0, -1]].norm()))
    assert differences[0] < 0.2 * differences[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"strength": 0.5, "height": 48, "width": 96},
            r"strength=0\.5 \(sampling\.init\.strength\) needs images to start from",
        ),
        ({"images": [picture()]}, "images need a strength in 0..1"),
        ({"images": [picture()], "strength": 1.5}, r"strength must be in 0\.\.1 or null, got 1\.5"),
        ({"images": [picture()], "strength": 0.1}, "is less than one step; raise it to 0.25, or set it to 0"),
        ({"images": picture(), "strength": 0.5}, "images must be a list"),
        (
            {"images": [picture()] * 2, "strength": 0.5},
            "images must be a list of one picture for each of 1 panorama, got 2",
        ),
        (
            {"images": [picture().astype(float)], "strength": 0.5},
            r"uint8 arrays \[H, W, 3\] or paths of files, got an item float64 \[48, 96, 3\]",
        ),
        ({"images": ["nowhere.png"], "strength": 0.5}, "images: cannot read nowhere.png: No such file"),
        ({"masks": [masked(slice(0, 9))], "strength": 0.5}, "masks need images"),
        (
            {"images": [picture()], "masks": [masked(slice(0, 9), 48, 48)], "strength": 0.5},
            r"the mask of 48x48 px \(height x width\) must have the size of its image, 48x96 px",
        ),
        ({"images": [picture()], "masks": [masked(slice(0, 96))], "strength": 0.5}, "the mask keeps everything"),
        ({"images": [picture()], "masks": [masked(slice(0, 0))], "strength": 0.5}, "the mask keeps nothing"),
        (
            {"images": [picture()], "masks": [picture()], "strength": 0.5},
            "masks must be PIL images, uint8 or bool arrays",
        ),
        ({"images": [picture(48, 100)], "strength": 0.5}, "width=100 px .* the nearest are 96 and 112 px"),
        (
            {"images": [picture()], "height": 48, "width": 64, "strength": 0.5},
            "the image of 48x96 px .* has another aspect ratio than the panorama of 48x64 px",
        ),
        ({}, "height and width are needed, in pixels"),
    ],
)
def test_wrong_pictures_are_refused(sampler, arguments, message):
    with pytest.raises(UserError, match=message):
        sampler.sample(PROMPT, **{**RUN, **arguments})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LMSDiscrete", "needs the predictions of steps that do not run"),
        ("IPNDM", "cannot add noise to pictures"),
        ("PNDM", "begins with Runge-Kutta steps"),
    ],
)
def test_schedulers_that_cannot_start_in_the_middle_are_refused_by_name(tiny, name, reason):
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", stride=4, scheduler=f"{name}Scheduler")
    with pytest.raises(UserError, match=rf"sampling\.scheduler={name}Scheduler {reason}.*use DDIMScheduler"):
        sampler.sample(PROMPT, images=[picture()], strength=0.5, **{**RUN, "num_inference_steps": 20})


def test_reference_view_cannot_start_from_pictures(tiny):
    overrides = ["method.merge.operator=swap", "method.merge.reference_steps=1", "method.mad.steps=0"]
    overrides += ["method.views.stride=6"]
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", overrides=overrides)
    with pytest.raises(UserError, match=r"method\.merge\.reference_steps=1 denoises a view that starts from noise"):
        sampler.sample(PROMPT, images=[picture(32, 80)], strength=0.5, **RUN)
