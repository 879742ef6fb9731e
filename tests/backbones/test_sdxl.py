import json
import shutil

import numpy as np
import pytest
import torch

from madgen import PanoramaSampler, UserError
from madgen.backbones import backbone_module
from madgen.diffusion.attention import JointStep
from madgen.hub.weights import ModelFiles

SIZE = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0}


def sampler(folder, **method):
    return PanoramaSampler.from_pretrained(str(folder), name="sdxl", dtype="float32", **method)


@pytest.fixture(scope="module")
def pipeline(tiny_xl):
    from diffusers import StableDiffusionXLPipeline

    loaded = StableDiffusionXLPipeline.from_pretrained(tiny_xl, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def relative_error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def test_describe_reads_shapes_from_config_files(tiny_xl):
    spec = backbone_module("sdxl").describe(ModelFiles(str(tiny_xl)))
    assert (spec.channels, spec.factor, spec.view_size, spec.coarsest) == (4, 4, 8, 2)
    full = backbone_module("sdxl").family_spec("stabilityai/stable-diffusion-xl-base-1.0")
    assert (full.channels, full.factor, full.view_size, full.coarsest) == (4, 8, 128, 4)


@pytest.mark.parametrize("negative", ["fog", ""])
def test_whole_layout_is_the_plain_pipeline(tiny_xl, pipeline, negative):
    """An empty negative prompt is none at all: diffusers then takes zeros, as the checkpoint asks for."""
    options = {"negative_prompt": negative or None, "generator": torch.Generator().manual_seed(5), **SIZE}
    reference = pipeline("a hill", output_type="latent", **options).images
    ours = sampler(tiny_xl, layout="whole", mad_steps=0)
    latents = ours.sample(["a hill"], negative_prompts=[negative], seeds=[5], output="latent", **SIZE)
    assert relative_error(latents, reference) <= 1e-4


def test_images_equal_the_plain_pipelines(tiny_xl, pipeline):
    options = {"negative_prompt": "fog", "generator": torch.Generator().manual_seed(5), **SIZE}
    reference = pipeline("a hill", output_type="np", **options).images[0]
    ours = sampler(tiny_xl, layout="whole", mad_steps=0)
    image = ours.sample(["a hill"], negative_prompts=["fog"], seeds=[5], **SIZE)[0]
    assert abs(image.astype(int) - (reference * 255).round().astype(int)).max() <= 1


def test_without_forced_zeros_the_empty_prompt_is_encoded(tiny_xl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path / "encoded"
    shutil.copytree(tiny_xl, folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(
        json.dumps({**index, "force_zeros_for_empty_prompt": False}), encoding="utf-8"
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    reference = pipeline("a hill", output_type="latent", generator=torch.Generator().manual_seed(5), **SIZE).images
    run = {"seeds": [5], "output": "latent", **SIZE}
    assert relative_error(sampler(folder, layout="whole", mad_steps=0).sample(["a hill"], **run), reference) <= 1e-4
    assert relative_error(sampler(tiny_xl, layout="whole", mad_steps=0).sample(["a hill"], **run), reference) > 1e-3


@torch.no_grad()
def naive_multidiffusion(pipeline, starts, prompt, negative, seed, steps, guidance_scale):
    """MultiDiffusion written down with diffusers alone: each 8x8 view stepped by a separate scheduler, averaged."""
    hidden, no_hidden, pooled, no_pooled = pipeline.encode_prompt(prompt, negative_prompt=negative)
    embeddings, summaries = torch.cat([no_hidden, hidden]), torch.cat([no_pooled, pooled])
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    schedulers = [type(pipeline.scheduler).from_config(pipeline.scheduler.config) for _ in starts]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    canvas = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(seed)) * schedulers[0].init_noise_sigma
    for timestep in schedulers[0].timesteps:
        total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for start, scheduler in zip(starts, schedulers, strict=True):
            columns = [(start + offset) % 16 for offset in range(8)]
            view = canvas[..., columns]
            twice = scheduler.scale_model_input(torch.cat([view, view]), timestep)
            added = {"text_embeds": summaries, "time_ids": sizes}
            noise = pipeline.unet(twice, timestep, encoder_hidden_states=embeddings, added_cond_kwargs=added).sample
            guided = noise[:1] + guidance_scale * (noise[1:] - noise[:1])
            total[..., columns] += scheduler.step(guided, timestep, view).prev_sample
            count[..., columns] += 1
        canvas = total / count
    return canvas


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_multidiffusion_equals_views_stepped_separately_and_averaged(tiny_xl, pipeline, monkeypatch, loop, prediction):
    """Flat and circular, as diffusers has it for Stable Diffusion alone (`tests/parity`)."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=prediction)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    starts = range(0, 16, 2) if loop else range(0, 9, 2)
    reference = naive_multidiffusion(pipeline, starts, "a hill", "fog", 7, 3, 3.0)
    run = {"negative_prompts": ["fog"], "seeds": [7], "output": "latent", "loop": loop, **SIZE}

    def latents(steps):
        mad = sampler(tiny_xl, stride=2, mad_steps=steps)
        mad.backbone.scheduler = scheduler
        return mad.sample(["a hill"], **run)

    assert relative_error(latents(0), reference) <= 1e-4
    assert relative_error(latents(3), reference) > 1e-3


@pytest.mark.parametrize(
    ("blocks", "count"),
    [(["down"], 4), (["mid"], 4), (["up"], 8), (["down", "mid", "up"], 16), (["up_blocks.0.*blocks.1.attn1*"], 2)],
)
def test_blocks_select_layers_and_steps_select_when(tiny_xl, monkeypatch, blocks, count):
    """Two transformer layers a block, and none at the highest level; counts what the layers do."""
    from madgen.diffusion import attention

    merged_calls = []
    original = attention.merge_cells
    monkeypatch.setattr(attention, "merge_cells", lambda *args: merged_calls.append(1) or original(*args))
    sampler(tiny_xl, mad_steps=2, mad_blocks=blocks).sample(["a hill"], seeds=[1], output="latent", **SIZE)
    assert len(merged_calls) == 2 * count


def test_a_prompt_does_not_depend_on_its_neighbours_in_the_batch(tiny_xl):
    """One of the negative prompts is empty, so only its path is zeros."""
    mad = sampler(tiny_xl, mad_steps=2)
    prompts, negatives, seeds = ["a hill", "the sea at night", "dunes"], ["", "fog", "sun"], [3, 4, 5]
    run = {"output": "latent", **SIZE}
    together = mad.sample(prompts, negative_prompts=negatives, seeds=seeds, **run)
    for index in range(3):
        alone = mad.sample([prompts[index]], negative_prompts=[negatives[index]], seeds=[seeds[index]], **run)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_size_conditions_hold_the_size_of_the_view(tiny_xl, monkeypatch):
    mad = sampler(tiny_xl, mad_steps=1)
    conditions = []
    forward = mad.backbone.unet.forward
    monkeypatch.setattr(
        mad.backbone.unet, "forward", lambda *a, **k: conditions.append(k["added_cond_kwargs"]) or forward(*a, **k)
    )
    mad.sample(["a hill", "the sea"], seeds=[1, 2], output="latent", **SIZE)
    views = 2 * 2 * 5  # negative and prompt, two panoramas, views
    assert conditions[0]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * views
    assert conditions[0]["text_embeds"].shape == (views, 40)


def test_noise_prediction_and_decoding_are_differentiable(tiny_xl):
    mad = sampler(tiny_xl, mad_steps=1)
    backbone, pair = mad.backbone, mad.geometry.build(32, 40).at(0)
    conditioning = backbone.encode_prompts(["a hill"], [""], 3.0)
    views = torch.randn(1, pair.count, 4, 8, 8, requires_grad=True)
    for step in (0, 1):  # merged, then not
        views.grad = None
        joint = JointStep(pair, step, mad.method.merging)
        backbone.predict_noise(views, torch.tensor(500), conditioning, joint).square().sum().backward()
        assert views.grad.abs().min() > 0
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    backbone.decode(latents).sum().backward()
    assert latents.grad.abs().max() > 0


def test_latents_are_unscaled_with_means_and_deviations_where_the_vae_has_them(tiny_xl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path / "shifted"
    shutil.copytree(tiny_xl, folder)
    config = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))
    changed = {"latents_mean": [0.5, -0.5, 0.1, 0.0], "latents_std": [2.0, 1.5, 1.0, 3.0]}
    (folder / "vae/config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}

    def keep(_, step, timestep, values):
        return {**values, "latents": latents}

    reference = pipeline("a hill", height=32, width=64, callback_on_step_end=keep, **options).images[0]
    ours = sampler(folder).backbone.decode(latents)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - reference).max() <= 1e-5
    vae, pixels = sampler(folder).backbone.vae, torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = vae.encode(pixels * 2 - 1).latent_dist.mean
        encoded = sampler(folder).backbone.encode(pixels)
    stds, means = (torch.tensor(changed[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("std", "mean"))
    torch.testing.assert_close(encoded, (mean - means) / stds * vae.config.scaling_factor, atol=1e-5, rtol=1e-5)


def test_half_precision_decoder_runs_in_float32_if_its_config_requires_it(tiny_xl, tmp_path):
    half = PanoramaSampler.from_pretrained(str(tiny_xl), name="sdxl", dtype="float16")
    assert (half.backbone.vae.dtype, half.backbone.unet.dtype) == (torch.float32, torch.float16)
    folder = tmp_path / "safe"
    shutil.copytree(tiny_xl, folder)
    config = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))
    (folder / "vae/config.json").write_text(json.dumps({**config, "force_upcast": False}), encoding="utf-8")
    safe = PanoramaSampler.from_pretrained(str(folder), name="sdxl", dtype="float16")
    assert safe.backbone.vae.dtype == torch.float16


def test_bfloat16_runs_and_is_close(tiny_xl):
    run = {"seeds": [1], "output": "latent", **SIZE}
    half = PanoramaSampler.from_pretrained(str(tiny_xl), name="sdxl", dtype="bfloat16", mad_steps=2)
    error = relative_error(half.sample(["a hill"], **run), sampler(tiny_xl, mad_steps=2).sample(["a hill"], **run))
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("sdxl", "model_index.json", {"requires_aesthetics_score": True}, "is a refiner"),
        (
            "sdxl",
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "name=sdxl loads StableDiffusionXLPipeline; set backbone.name=flux",
        ),
        ("sdxl", "unet/config.json", {"addition_embed_type": None}, "addition_embed_type is None"),
        ("sd", "unet/config.json", {}, "is a StableDiffusionXLPipeline; backbone.name=sd loads"),
    ],
)
def test_models_of_another_kind_are_refused(tiny_xl, tmp_path, name, file, change, message):
    folder = tmp_path / "other"
    shutil.copytree(tiny_xl, folder)
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        PanoramaSampler.from_pretrained(str(folder), name=name)
