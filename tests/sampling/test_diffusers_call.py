"""`sampler(...)` has the names and semantics of `DiffusionPipeline.__call__`."""

import re

import numpy as np
import pytest
import torch
from parameters import combinations
from PIL import Image

from madgen import PanoramaSampler, UserError
from madgen.config.loader import load_job

RUN = {"num_inference_steps": 3, "guidance_scale": 4.0}


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def quiet(caller):
    caller.set_progress_bar_config(disable=True)
    return caller


@pytest.fixture(scope="module")
def pipes(tiny, tiny_xl):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    return {
        "sd": quiet(StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)),
        "sdxl": quiet(StableDiffusionXLPipeline.from_pretrained(tiny_xl, add_watermarker=False)),
    }


@pytest.fixture(scope="module")
def samplers(tiny, tiny_xl):
    return {
        name: quiet(PanoramaSampler.from_pretrained(folder, name=name, layout="whole", mad_steps=0))
        for name, folder in (("sd", tiny), ("sdxl", tiny_xl))
    }


@pytest.fixture(scope="module")
def mad(tiny):
    return quiet(PanoramaSampler.from_pretrained(tiny, mad_steps=1))


CALLS = [
    {},
    {"height": 48, "width": 80},
    {"negative_prompt": "fog"},
    {"prompt": ["a hill", "the sea"], "negative_prompt": ["fog", "noon"]},
    {"prompt": ["a hill", "the sea"], "num_images_per_prompt": 2},
    {"generator": [1, 2], "num_images_per_prompt": 2},
    {"guidance_scale": 0.0},
    {"output_type": "pt"},
    {"output_type": "latent"},
    {"output_type": "pil"},
]


@pytest.mark.parametrize(("family", "options"), combinations(["sd", "sdxl"], CALLS, one_in=2))
def test_whole_layout_equals_the_pipeline(pipes, samplers, family, options):
    def images(caller):
        seeds = options.get("generator")
        generator = seeded() if seeds is None else [seeded(seed) for seed in seeds]
        return caller(**{"prompt": "a hill", "output_type": "np", **RUN, **options, "generator": generator}).images

    expected, made = images(pipes[family]), images(samplers[family])
    assert type(made) is type(expected)
    assert len(made) == len(expected)
    for ours, theirs in zip(made, expected, strict=True):
        if isinstance(theirs, Image.Image):
            assert ours.size == theirs.size
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
        else:
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            assert abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_default_generator_and_given_latents_are_used_as_in_diffusers(pipes, samplers, family):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5))

    def images(caller):
        torch.manual_seed(3)
        return caller("a hill", output_type="np", **RUN).images, caller(
            "a hill", latents=noise, output_type="np", **RUN
        ).images

    for ours, theirs in zip(images(samplers[family]), images(pipes[family]), strict=True):
        assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_embeddings_of_the_pipeline_replace_prompts(pipes, samplers, family):
    pipe, sampler = pipes[family], samplers[family]
    encoded = pipe.encode_prompt(
        prompt=["a hill", "the sea"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
        negative_prompt=["fog", "fog"],
    )  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeddings = dict(zip(names, encoded, strict=False))
    expected = sampler(["a hill", "the sea"], negative_prompt="fog", generator=seeded(), output_type="np", **RUN).images
    assert np.abs(sampler(**embeddings, generator=seeded(), output_type="np", **RUN).images - expected).max() < 1e-4
    other = {name: tensor.flip(0) for name, tensor in embeddings.items()}
    assert np.abs(sampler(**other, generator=seeded(), output_type="np", **RUN).images - expected).max() > 1e-3
    copies = sampler(**embeddings, num_images_per_prompt=2, generator=seeded(), output_type="latent", **RUN).images
    assert copies.shape[0] == 4


def test_custom_timesteps_and_eta_follow_the_pipeline(pipes, samplers):
    from diffusers import DDPMScheduler

    def images(caller, **options):
        options = {"guidance_scale": 4.0, "generator": seeded(), "output_type": "np", **options}
        return caller("a hill", **options).images

    for options in ({"timesteps": [900, 500, 100]}, {"num_inference_steps": 3, "eta": 0.7}):
        swapped = "timesteps" in options
        pipe, sampler = pipes["sd"], samplers["sd"]
        before = pipe.scheduler
        if swapped:  # DDIM takes no timesteps
            pipe.scheduler = sampler.scheduler = DDPMScheduler.from_config(before.config)
        try:
            assert np.abs(images(pipe, **options) - images(sampler, **options)).max() < 1e-4
        finally:
            pipe.scheduler = sampler.scheduler = before
    with pytest.raises(ValueError, match="DDIMScheduler takes no custom timesteps; pass num_inference_steps"):
        images(samplers["sd"], timesteps=[900, 500])
    with pytest.raises(ValueError, match="pass either timesteps or sigmas"):
        images(samplers["sd"], timesteps=[900], sigmas=[1.0])


def test_a_seed_of_sample_is_a_generator_of_the_call(mad):
    size = {"height": 32, "width": 96}
    expected = mad.sample(["a hill", "the sea"], seeds=[1, 2], output="latent", **size, **RUN)
    generators = [seeded(1), seeded(2)]
    made = mad(["a hill", "the sea"], generator=generators, output_type="latent", **size, **RUN).images
    assert torch.equal(made, expected)


def test_outputs_of_sample_are_one_image(mad):
    def sample(output):
        return mad.sample("a hill", height=32, width=96, seeds=[1], output=output, num_inference_steps=2)

    levels, (image,), numbers, tensor = (sample(output) for output in ("image", "pil", "np", "pt"))
    assert np.array_equal(levels[0], np.asarray(image))
    assert np.array_equal(levels, (numbers * 255).round().astype(np.uint8))
    assert np.array_equal(numbers, tensor.permute(0, 2, 3, 1).numpy())
    assert numbers.dtype == np.float32


@pytest.mark.parametrize("preset", ["demo", "sd2", "sdxl"])
def test_the_default_size_is_that_of_the_preset(preset, tiny, tiny_xl):
    """The tiny backbones have views of 32 px; here they stand for those of the presets."""
    from dataclasses import replace

    from processes import ROOT

    job = load_job(ROOT / f"configs/backbone/{preset}.yaml")
    sampler = PanoramaSampler.from_pretrained(
        tiny_xl if preset == "sdxl" else tiny, name=job.backbone.name, mad_steps=1
    )
    assert sampler.default_size == (32, 192)
    cells = {"demo": 32, "sd2": 64, "sdxl": 128}[preset]
    factor = job.sampling.height // cells
    sampler.backbone.spec = replace(sampler.backbone.spec, view_size=cells, factor=factor)
    assert sampler.default_size == (job.sampling.height, job.sampling.width)


def test_a_callback_sees_and_replaces_the_latents_of_each_step(mad):
    seen, size = [], {"height": 32, "width": 64}

    def watch(caller, step, timestep, tensors):
        seen.append((caller, step, int(timestep), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    made = mad("a hill", generator=seeded(), output_type="latent", callback_on_step_end=watch, **size, **RUN).images
    assert [(caller, step) for caller, step, _, _ in seen] == [(mad, 0), (mad, 1), (mad, 2)]
    assert [timestep for _, _, timestep, _ in seen] == mad.new_scheduler(3).timesteps.tolist()
    assert not made.any()
    plain = mad("a hill", generator=seeded(), output_type="latent", **size, **RUN).images
    assert torch.equal(seen[-1][-1], plain)


def test_a_callback_interrupts_the_call(mad):
    seen = []

    def stop(caller, step, timestep, tensors):
        seen.append(tensors["latents"])
        caller._interrupt = step == 1
        return tensors

    options = {"height": 32, "width": 64, "output_type": "latent", **RUN}
    made = mad("a hill", generator=seeded(), callback_on_step_end=stop, **options).images
    assert len(seen) == 2
    assert torch.equal(made, seen[-1])
    assert not torch.equal(mad("a hill", generator=seeded(), **options).images, made)  # the next call runs to its end


def test_a_bar_shows_the_steps(tiny, capsys):
    sampler = PanoramaSampler.from_pretrained(tiny, mad_steps=1)
    options = {"height": 32, "width": 64, **RUN}
    sampler("a hill", **options)
    assert "3/3" in capsys.readouterr().err
    sampler.sample(["a hill"], seeds=[1], **options)
    sampler.set_progress_bar_config(disable=True)
    sampler("a hill", **options)
    assert capsys.readouterr().err == ""


def test_the_result_unpacks_like_a_tuple(mad):
    (images,) = mad("a hill", height=32, width=64, return_dict=False, num_inference_steps=1)
    assert isinstance(images[0], Image.Image)
    assert mad("a hill", height=32, width=64, num_inference_steps=1)[0][0].size == (64, 32)


def embeddings(count=1, tokens=16, width=96):
    return torch.zeros(count, tokens, width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "pass a prompt or prompt_embeds"),
        ({"prompt_embeds": embeddings()}, "pass either prompt or prompt_embeds, not both"),
        ({"prompt": 5}, "prompt must be a list, such as [...], got 5"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text or 1, one for each prompt, got 2"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number >= 1, got 0"),
        ({"generator": 7}, "generator must be a torch.Generator or a list of them, got 7"),
        ({"generator": [seeded()] * 3}, "generator must be one or a list of 1, one for each panorama, got 3"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents must be of shape (1, 4, 8, 16) for this size"),
        ({"latents": [1]}, "latents must be a floating-point tensor of 4 dimensions, got list"),
        ({"output_type": "jpg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent', got 'jpg'"),
        ({"prompt": None, "prompt_embeds": embeddings(width=5)}, "prompt_embeds must be of width 96"),
        ({"prompt": None, "prompt_embeds": embeddings(tokens=5)}, "must have equally many tokens, got 5 and"),
        ({"pooled_prompt_embeds": torch.zeros(1, 4)}, "pooled_prompt_embeds need prompt_embeds; pass both"),
        ({"eta": 1.0, "scheduler": "EulerDiscreteScheduler"}, "eta=1 has no effect with EulerDiscreteScheduler"),
        ({"clip_skip": 1}, "clip_skip is not supported: encode the prompt with pipe.encode_prompt"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function, got 5"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "only 'latents' are available"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, "must return latents of shape (1, 4, 8, 16)"),
        ({"callback_on_step_end": lambda *_: {"image": 1}}, "may return new latents only, got image"),
        ({"width": 100}, "width=100 px cannot be covered by views"),
    ],
)
def test_invalid_arguments_are_refused(mad, options, message):
    options = {"prompt": "a hill", "height": 32, "width": 64, **RUN, **options}
    scheduler, before = options.pop("scheduler", None), mad.scheduler
    if scheduler is not None:
        import diffusers

        mad.scheduler = getattr(diffusers, scheduler).from_config(before.config)
    try:
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            mad(**options)
    finally:
        mad.scheduler = before
    assert isinstance(refused.value, UserError)


def test_unknown_arguments_are_type_errors_and_none_is_no_argument(mad):
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompts'"):
        mad(prompts=["a hill"])
    mad("a hill", height=32, width=64, num_inference_steps=1, ip_adapter_image=None, clip_skip=None)
    with pytest.raises(TypeError, match=r"from_pretrained\(\) got an unexpected keyword argument 'dtyp'"):
        PanoramaSampler.from_pretrained("demo", dtyp="bfloat16")


def test_loading_arguments_of_diffusers_are_refused_with_an_alternative():
    with pytest.raises(UserError, match='torch_dtype is not supported: use dtype="bfloat16"'):
        PanoramaSampler.from_pretrained("demo", torch_dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "instead"), [("to", 'device="cuda"'), ("enable_vae_tiling", 'decode="tiled"'), ("unet", "from_pipe")]
)
def test_attributes_of_pipelines_name_an_alternative(mad, name, instead):
    assert not hasattr(mad, name)
    with pytest.raises(AttributeError, match=f"PanoramaSampler has no attribute {name!r}: .*{re.escape(instead)}"):
        getattr(mad, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'unknown'$"):
        _ = mad.unknown
