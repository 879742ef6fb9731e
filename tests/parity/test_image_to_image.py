"""Compare sampling from pictures with diffusers' image-to-image and inpainting pipelines, and with plain loops."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from madgen import PanoramaSampler

DIT = Path(__file__).parent / "golden" / "dit"
PROMPT, SEED = "a photo of a hill", 7


def picture(height, width, seed=0):
    """Return a picture of large and small structures."""
    noise = np.random.default_rng(seed).normal(size=(8, 12, 3)).clip(-2, 2) * 63 + 128
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def whole(folder, **options):
    return PanoramaSampler.from_pretrained(str(folder), dtype="float32", layout="whole", mad_steps=0, **options)


def encoded(sampler, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        return sampler.backbone.encode(pixels)


UNETS = {
    "sd": ("tiny", diffusers.StableDiffusionImg2ImgPipeline),
    "sdxl": ("tiny_xl", diffusers.StableDiffusionXLImg2ImgPipeline),
}
OFTEN = [("sd", name) for name in ("DDIM", "EulerAncestralDiscrete", "HeunDiscrete")] + [("sdxl", "EulerDiscrete")]
SELDOM = [("sd", name) for name in ("DPMSolverMultistep", "UniPCMultistep", "DDPM", "PNDM", "KDPM2Discrete", "LCM")]


@pytest.mark.parametrize(
    ("name", "scheduler"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)]
)
@pytest.mark.parametrize("strength", [0.35, 0.8])
def test_whole_layout_equals_the_image_to_image_pipeline(request, name, strength, scheduler):
    fixture, pipeline = UNETS[name]
    folder, image = request.getfixturevalue(fixture), picture(48, 64)
    options = {"scheduler_options": {"skip_prk_steps": True}} if scheduler == "PNDM" else {}
    sampler = whole(folder, name=name, scheduler=f"{scheduler}Scheduler", **options)
    pipe = pipeline.from_pretrained(folder)
    config = {**pipe.scheduler.config, **options.get("scheduler_options", {})}
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(config)
    run = {"num_inference_steps": 10, "guidance_scale": 3.0, "strength": strength}
    generator = torch.Generator().manual_seed(SEED)
    reference = pipe(PROMPT, image=encoded(sampler, image), generator=generator, output_type="latent", **run).images
    ours = sampler.sample([PROMPT], images=[image], seeds=[SEED], output="latent", **run)
    assert error(ours, reference) <= 1e-5


FLOWS = {"flux": diffusers.FluxImg2ImgPipeline, "sd3": diffusers.StableDiffusion3Img2ImgPipeline}


@pytest.mark.parametrize("strength", [0.35, 0.8])
@pytest.mark.parametrize("name", list(FLOWS))
def test_whole_layout_equals_the_image_to_image_pipeline_of_transformers(name, strength):
    folder = DIT / {"flux": "tiny-flux-dev", "sd3": "tiny-sd3"}[name]
    sampler = whole(folder, name=name, overrides=["backbone.max_sequence_length=24"])
    image = picture(32, 48)
    pipe = FLOWS[name].from_pretrained(folder)
    run = {"num_inference_steps": 7, "guidance_scale": 3.5, "strength": strength}  # 2.45 and 5.6 steps
    reference = pipe(
        PROMPT, image=encoded(sampler, image), height=32, width=48, max_sequence_length=24, output_type="pt",
        generator=torch.Generator().manual_seed(SEED), **run,
    ).images  # fmt: skip
    ours = sampler.sample([PROMPT], images=[image], seeds=[SEED], output="pt", **run)
    assert error(ours, reference) <= 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete"])
def test_known_cells_equal_those_of_the_inpainting_pipeline(tiny, scheduler, strength):
    image, known = picture(48, 64), np.zeros((48, 64), bool)
    known[8:40, 16:44] = True
    sampler = whole(tiny, scheduler=f"{scheduler}Scheduler")
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tiny)
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    pipe._encode_vae_image = lambda *_, **__: encoded(sampler, image)  # the mean, without random numbers
    run = {"num_inference_steps": 10, "guidance_scale": 3.0, "strength": strength}
    reference = pipe(
        PROMPT, image=image, mask_image=Image.fromarray((~known).astype(np.uint8) * 255), height=48, width=64,
        generator=torch.Generator().manual_seed(SEED), output_type="latent", **run,
    ).images  # fmt: skip
    ours = sampler.sample([PROMPT], images=[image], masks=[known], seeds=[SEED], output="latent", **run)
    assert error(ours, reference) <= 1e-5


def test_overlapping_views_equal_a_plain_loop(tiny):
    """MultiDiffusion from a picture: views of 8x8 cells every 4, averaged, DDIM from the middle of the schedule."""
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", stride=4, mad_steps=0)
    image, steps, strength = picture(48, 64), 10, 0.5
    ours = sampler.sample(
        [PROMPT], images=[image], strength=strength, num_inference_steps=steps, guidance_scale=3.0, seeds=[SEED],
        output="latent",
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[5:]
    noise = torch.randn((1, 4, 12, 16), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "")
        latents = scheduler.add_noise(encoded(sampler, image), noise, timesteps[:1])
        for time in timesteps:
            total, count = torch.zeros_like(latents), torch.zeros(12, 16)
            for top in (0, 4):
                for left in (0, 4, 8):
                    view = latents[..., top : top + 8, left : left + 8]
                    guided, free = (pipe.unet(view, time, hidden).sample for hidden in (positive, negative))
                    total[..., top : top + 8, left : left + 8] += free + 3.0 * (guided - free)
                    count[top : top + 8, left : left + 8] += 1
            latents = scheduler.step(total / count, time, latents).prev_sample
    assert error(ours, latents) <= 1e-5
