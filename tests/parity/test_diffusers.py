"""Compare with diffusers' pipelines, run on the weights of `golden/`."""

from pathlib import Path

import pytest
import torch

from madgen import PanoramaSampler, UserError

GOLDEN = Path(__file__).parent / "golden"
PROMPT = "a photo of a hill"


def relative_error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.slow
def test_loop_equals_the_panorama_pipeline_with_circular_padding():
    """diffusers' circular views start at every 8th column and wrap: `loop=True` with stride 8. It pads the decoder's
    input with 8 columns, madgen with a view's width; pictures are compared with 8.
    """
    from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline

    scheduler = DDIMScheduler.from_pretrained(GOLDEN / "tiny-sd", subfolder="scheduler")
    pipeline = StableDiffusionPanoramaPipeline.from_pretrained(
        GOLDEN / "tiny-sd", scheduler=scheduler, safety_checker=None
    )
    size = {"height": 512, "width": 576, "num_inference_steps": 2, "guidance_scale": 5.0}

    def reference(**options):
        return pipeline(
            PROMPT,
            negative_prompt="fog",
            generator=torch.Generator().manual_seed(3),
            view_batch_size=9,
            **size,
            **options,
        ).images

    circular = reference(circular_padding=True, output_type="latent")
    sampler = PanoramaSampler.from_pretrained(str(GOLDEN / "tiny-sd"), dtype="float32", stride=8, mad_steps=0)
    run = {"negative_prompts": ["fog"], "seeds": [3], "output": "latent", **size}
    latents = sampler.sample([PROMPT], loop=True, **run)
    assert relative_error(latents, circular) <= 1e-4
    assert relative_error(sampler.sample([PROMPT], **run), circular) > 1e-3
    with torch.no_grad():
        theirs = (pipeline.decode_latents_with_padding(circular) / 2 + 0.5).clamp(0, 1)
        ours = sampler.backbone.decode(latents, wrap=8)
    assert float((ours - theirs).abs().max()) <= 1e-3


@pytest.fixture(scope="module")
def consistency():
    from diffusers import LatentConsistencyModelPipeline

    return LatentConsistencyModelPipeline.from_pretrained(GOLDEN / "tiny-lcm", safety_checker=None)


@pytest.mark.parametrize("original", [None, 20])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_whole_layout_equals_the_latent_consistency_pipeline(consistency, steps, original):
    size = {"height": 256, "width": 384, "num_inference_steps": steps, "guidance_scale": 8.5}
    generator = torch.Generator().manual_seed(6)
    reference = consistency(
        PROMPT, original_inference_steps=original, generator=generator, output_type="latent", **size
    ).images

    def latents(chosen):
        sampler = PanoramaSampler.from_pretrained(
            str(GOLDEN / "tiny-lcm"), dtype="float32", layout="whole", mad_steps=0, original_inference_steps=chosen
        )
        return sampler.sample([PROMPT], seeds=[6], output="latent", **size)

    assert relative_error(latents(original), reference) <= 1e-4
    assert relative_error(latents(30), reference) > 1e-3


def test_original_steps_are_refused_by_other_schedulers():
    sampler = PanoramaSampler.from_pretrained(str(GOLDEN / "tiny-sd"), original_inference_steps=50)
    with pytest.raises(
        UserError, match=r"original_inference_steps=50 is not supported by DDIMScheduler; set it to null"
    ):
        sampler.new_scheduler(4)
    lcm = PanoramaSampler.from_pretrained(str(GOLDEN / "tiny-lcm"), original_inference_steps=2, mad_steps=0)
    with pytest.raises(UserError, match=r"steps=4 is not possible .*original.*; the largest possible number is 2"):
        lcm.new_scheduler(4)
