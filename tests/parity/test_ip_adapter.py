"""Compare IP-Adapters with diffusers' pipelines, and with plain loops over views."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_controlnet import PROMPT, SIZE, control_of, picture, relative_error

from madgen import Box, PanoramaSampler, Region
from madgen.diffusion.views import build_layout

FAMILIES = ("sd", "sdxl")
NEGATIVE = "fog"
CALL = {"num_inference_steps": 3, "guidance_scale": 4.0}
EMBEDDING = 8


def save_encoder(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=EMBEDDING, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def projection_of(kind, width):
    """Return the tensors of an image projection in the layout of published files."""
    if kind == "plain":
        return {
            "proj.weight": torch.randn(4 * width, EMBEDDING),
            "proj.bias": torch.randn(4 * width),
            "norm.weight": torch.rand(width) + 0.5,
            "norm.bias": torch.randn(width),
        }
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    state = IPAdapterPlusImageProjection(16, width, hidden_dims=64, heads=1, num_queries=4).state_dict()
    published = {}
    for name, value in state.items():
        if match := re.fullmatch(r"layers\.(\d)\.attn\.to_k\.weight", name):
            pair = [value, state[name.replace("to_k", "to_v")]]
            published[f"layers.{match[1]}.0.to_kv.weight"] = torch.cat(pair)
        elif match := re.fullmatch(r"layers\.(\d)\.attn\.(to_q|to_out)(\.0)?\.weight", name):
            published[f"layers.{match[1]}.0.{match[2]}.weight"] = value
        elif "to_v" not in name:
            published[name] = value
    return published


def save_adapter(folder, unet, kind="plain"):
    """Save an IP-Adapter of random weights, with its image encoder."""
    torch.manual_seed(3)
    width = unet.config.cross_attention_dim
    state = {f"image_proj.{name}": value for name, value in projection_of(kind, width).items()}
    for index, layer in enumerate(layer for name, layer in processors(unet) if name.endswith("attn2.processor")):
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * index + 1}.{part}.weight"] = torch.randn(layer.to_q.out_features, width)
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "adapter.safetensors")
    save_encoder(folder / "image_encoder")


def processors(unet):
    for name in unet.attn_processors:
        yield name, unet.get_submodule(name.removesuffix(".processor"))


@pytest.fixture(scope="module")
def pipelines(tiny, tiny_xl, tmp_path_factory):
    """Return diffusers' pipelines with an IP-Adapter, their folders, and those of the adapters, by family and kind."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    made = {}
    for name, kind in (("sd", "plain"), ("sd", "plus"), ("sdxl", "plain")):
        folder, cls = (tiny, StableDiffusionPipeline) if name == "sd" else (tiny_xl, StableDiffusionXLPipeline)
        pipe = cls.from_pretrained(folder)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        weights = tmp_path_factory.mktemp("adapter") / "files"
        save_adapter(weights / "models", pipe.unet, kind)
        pipe.load_ip_adapter(str(weights), subfolder="models", weight_name="adapter.safetensors")
        pipe.set_progress_bar_config(disable=True)
        made[name, kind] = pipe, folder, weights
    return made


def sampler_of(pipelines, name, *overrides, kind="plain", **options):
    _, folder, weights = pipelines[name, kind]
    options = {"mad_steps": 0, "dtype": "float32", "scheduler": "DDIMScheduler", **options}
    adapter = f"backbone.ip_adapter={{weights: {weights}, subfolder: models}}"
    return PanoramaSampler.from_pretrained(
        str(folder), name=name, overrides=[adapter, *overrides], scheduler_options={"clip_sample": False}, **options
    )


def latents(sampler, style, **options):
    options = {**SIZE, **CALL, "negative_prompts": [NEGATIVE], "seeds": [3], "output": "latent", **options}
    return sampler.sample([PROMPT], style=style, **options)


def reference(pipe, style, scale=1.0, **options):
    pipe.set_ip_adapter_scale(scale)
    options = {**SIZE, **CALL, "negative_prompt": NEGATIVE, "output_type": "latent", **options}
    return pipe(PROMPT, ip_adapter_image=style, generator=torch.Generator().manual_seed(3), **options).images


@pytest.mark.parametrize(("name", "kind"), [("sd", "plain"), ("sd", "plus"), ("sdxl", "plain")])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_whole_layout_equals_diffusers(pipelines, name, kind, scale):
    pipe, style = pipelines[name, kind][0], picture(48, 64)
    sampler = sampler_of(pipelines, name, f"backbone.ip_adapter.scale={scale}", kind=kind, layout="whole")
    assert relative_error(latents(sampler, [style]), reference(pipe, style, scale)) <= 1e-5
    assert relative_error(latents(sampler, [np.asarray(style)]), reference(pipe, picture(48, 64, 9), scale)) > 1e-3
    unguided = {"guidance_scale": 1.0}
    theirs = reference(pipe, style, scale, negative_prompt=None, **unguided)
    assert relative_error(latents(sampler, [style], negative_prompts=None, **unguided), theirs) <= 1e-5


@torch.no_grad()
def view_by_view(pipe, style, layout, height, width):
    """MultiDiffusion with an IP-Adapter for Stable Diffusion, as a plain loop: all views see the whole picture."""
    pipe.set_ip_adapter_scale(1.0)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(CALL["num_inference_steps"])
    canvas = torch.randn(1, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(3))
    hidden, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    hidden = torch.cat([negative, hidden])
    embedded = pipe.prepare_ip_adapter_image_embeds(style, None, "cpu", 1, True)
    for step, timestep in enumerate(scheduler.timesteps):
        views = layout.at(step)
        total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for top in views.rows.starts:
            for left in views.columns.starts:
                rows = [(top + row) % canvas.shape[2] for row in range(8)]
                columns = [(left + column) % canvas.shape[3] for column in range(8)]
                view = canvas[:, :, rows][..., columns].repeat(2, 1, 1, 1)
                negative, positive = pipe.unet(
                    view, timestep, hidden, added_cond_kwargs={"image_embeds": embedded}
                ).sample.chunk(2)
                noise = negative + CALL["guidance_scale"] * (positive - negative)
                for row, y in enumerate(rows):
                    for column, x in enumerate(columns):
                        total[..., y, x] += noise[..., row, column]
                        count[..., y, x] += 1
        canvas = scheduler.step(total / count, timestep, canvas).prev_sample
    return canvas


@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("loop", [False, True])
def test_all_views_see_the_whole_picture(pipelines, kind, loop):
    style, layout = picture(48, 64), build_layout("overlapping", 8, 16, 8, 4, loop)
    theirs = view_by_view(pipelines["sd", kind][0], style, layout, 32, 64)
    sampler = sampler_of(pipelines, "sd", kind=kind, stride=4)
    assert relative_error(latents(sampler, [style], loop=loop), theirs) <= 1e-5
    assert relative_error(latents(sampler, [style], loop=loop, chunk_views=1), theirs) <= 1e-5


def test_merged_attention_of_one_view_is_that_of_the_whole_layout(pipelines):
    """With a single view, merging changes nothing; with several, it does."""
    style = [picture(48, 64)]
    merged, plain = (sampler_of(pipelines, "sd", mad_steps=steps, stride=4) for steps in (3, 0))
    one = {"height": 32, "width": 32}
    assert relative_error(latents(merged, style, **one), latents(plain, style, **one)) <= 1e-6
    assert relative_error(latents(merged, style), latents(plain, style)) > 1e-3


def test_each_panorama_follows_its_picture_in_batches_and_regions(pipelines):
    sampler = sampler_of(pipelines, "sd", "method.regions.bootstrapping=0", mad_steps=1, stride=4)
    styles, options = [picture(seed=1), picture(seed=2)], {**SIZE, **CALL, "output": "latent"}
    both = sampler.sample([PROMPT] * 2, style=styles, seeds=[3, 4], **options)
    alone = sampler.sample([PROMPT], style=styles[1:], seeds=[4], **options)
    assert relative_error(both[1], alone[0]) <= 1e-5
    region = Region(Box(8, 0, 40, 20), PROMPT)
    with_region = sampler.sample([PROMPT] * 2, style=styles, seeds=[3, 4], regions=[[region], []], **options)
    assert relative_error(with_region, both) <= 1e-5


def test_controlnet_and_ip_adapter_together_equal_diffusers(pipelines, tiny, tmp_path):
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    pipe = pipelines["sd", "plain"][0]
    network = control_of(StableDiffusionPipeline.from_pretrained(tiny).unet)
    network.save_pretrained(tmp_path / "control")
    both = StableDiffusionControlNetPipeline(**{**pipe.components, "controlnet": network})
    both.set_progress_bar_config(disable=True)
    theirs = reference(both, picture(48, 64), 0.8, image=picture(seed=5))
    sampler = sampler_of(
        pipelines, "sd", f"backbone.controlnet.weights={tmp_path / 'control'}", "backbone.ip_adapter.scale=0.8",
        layout="whole",
    )  # fmt: skip
    ours = latents(sampler, [picture(48, 64)], control=[picture(seed=5)])
    assert relative_error(ours, theirs) <= 1e-5


def test_scale_of_0_changes_nothing(pipelines, tiny):
    silent = sampler_of(pipelines, "sd", "backbone.ip_adapter.scale=0", mad_steps=1)
    plain = PanoramaSampler.from_pretrained(
        str(tiny), mad_steps=1, dtype="float32", scheduler="DDIMScheduler", scheduler_options={"clip_sample": False}
    )
    assert torch.equal(latents(silent, [Image.new("RGB", (32, 32))]), latents(plain, None))
