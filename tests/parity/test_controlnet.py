"""Compare ControlNets with diffusers' pipelines, and with plain loops over views that crop the control picture."""

import copy

import numpy as np
import pytest
import torch
from parameters import combinations
from PIL import Image

from madgen import Box, PanoramaSampler, Region
from madgen.diffusion.views import build_layout
from madgen.sampling.sampler import PanoramaSampler as Sampler

FAMILIES = ("sd", "sdxl")
PROMPT, NEGATIVE = "mountains over a meadow", "fog"
CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}
SIZE = {"height": 32, "width": 64}


def relative_error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def picture(height=32, width=64, seed=0):
    """Draw random stripes and blocks, different everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def control_of(unet):
    """Build a ControlNet of random weights that acts strongly."""
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8))
    for layer in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.3)
    embedding = network.controlnet_cond_embedding
    for layer in [embedding.conv_in, *embedding.blocks, embedding.conv_out]:
        torch.nn.init.kaiming_normal_(layer.weight)
    return network.eval()


@pytest.fixture(scope="module")
def pipelines(tiny, tiny_xl, tmp_path_factory):
    """Return diffusers' ControlNet pipelines, and the folders of their ControlNets, by family."""
    from diffusers import (
        DDIMScheduler,
        StableDiffusionControlNetPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLPipeline,
    )

    made = {}
    for name, folder, plain, cls in (
        ("sd", tiny, StableDiffusionPipeline, StableDiffusionControlNetPipeline),
        ("sdxl", tiny_xl, StableDiffusionXLPipeline, StableDiffusionXLControlNetPipeline),
    ):
        pipe = plain.from_pretrained(folder)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        network = control_of(pipe.unet)
        weights = tmp_path_factory.mktemp("controlnet") / name
        network.save_pretrained(weights)
        options = {"add_watermarker": False} if name == "sdxl" else {}
        pipe = cls(**{**pipe.components, **options, "controlnet": network})
        pipe.set_progress_bar_config(disable=True)
        made[name] = pipe, folder, weights
    return made


def sampler_of(pipelines, name, *overrides, **options):
    _, folder, weights = pipelines[name]
    options = {"mad_steps": 0, "dtype": "float32", "scheduler": "DDIMScheduler", **options}
    options["scheduler_options"] = {"clip_sample": False}
    return Sampler.from_pretrained(
        str(folder), name=name, overrides=[f"backbone.controlnet.weights={weights}", *overrides], **options
    )


def latents(sampler, control, **options):
    options = {**SIZE, **CALL, "negative_prompts": [NEGATIVE], "seeds": [3], "output": "latent", **options}
    return sampler.sample([PROMPT], control=control, **options)


def reference(pipe, control, **options):
    options = {**SIZE, **CALL, "negative_prompt": NEGATIVE, "output_type": "latent", **options}
    return pipe(PROMPT, image=control, generator=torch.Generator().manual_seed(3), **options).images


SETTINGS = {
    "default": ([], {}),
    "scale": (["backbone.controlnet.scale=0.6"], {"controlnet_conditioning_scale": 0.6}),
    "start and end": (
        ["backbone.controlnet={start: 0.25, end: 0.75, scale: 1.5}"],
        {"control_guidance_start": 0.25, "control_guidance_end": 0.75, "controlnet_conditioning_scale": 1.5},
    ),
    "without guidance": ([], {"guidance_scale": 1.0}),
}


@pytest.mark.parametrize(("name", "settings"), combinations(FAMILIES, list(SETTINGS), one_in=2))
def test_whole_layout_equals_diffusers(pipelines, name, settings):
    pipe, (overrides, call) = pipelines[name][0], SETTINGS[settings]
    options = {key: value for key, value in call.items() if key == "guidance_scale"}
    negatives = {"negative_prompt": None} if options else {}
    theirs = reference(pipe, picture(), **call, **negatives)
    sampler = sampler_of(pipelines, name, *overrides, layout="whole")
    ours = latents(sampler, [picture()], **options, **({"negative_prompts": None} if options else {}))
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(ours, reference(pipe, picture(seed=9), **call, **negatives)) > 3e-4


def test_pictures_of_other_sizes_are_resized_as_in_diffusers(pipelines):
    large = picture(120, 200)
    sampler = sampler_of(pipelines, "sd", layout="whole")
    theirs = reference(pipelines["sd"][0], large)
    assert relative_error(latents(sampler, [large]), theirs) <= 1e-5
    assert relative_error(latents(sampler, [np.asarray(large)]), theirs) <= 1e-5


def crop(canvas, top, left, height, width):
    """Cut a view out of [1, C, H, W], wrapping around."""
    rows = [(top + row) % canvas.shape[2] for row in range(height)]
    columns = [(left + column) % canvas.shape[3] for column in range(width)]
    return canvas[:, :, rows][:, :, :, columns]


def encoded(pipe, name):
    """Return the prompts' hidden states, negative first, and the UNet's further conditions for views of 8x8 cells."""
    if name == "sd":
        hidden, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        return torch.cat([negative, hidden]), None
    hidden, negative, pooled, pooled_negative = pipe.encode_prompt(
        PROMPT, device="cpu", do_classifier_free_guidance=True, negative_prompt=NEGATIVE
    )
    conditions = {
        "text_embeds": torch.cat([pooled_negative, pooled]),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(2, 1),
    }
    return torch.cat([negative, hidden]), conditions


@torch.no_grad()
def view_by_view(pipe, name, control, layout, height, width, scale=1.0):
    """MultiDiffusion with a ControlNet, as a plain loop."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(CALL["num_inference_steps"])
    canvas = torch.randn(1, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(3))
    pixels = torch.from_numpy(np.array(control)).permute(2, 0, 1)[None].float() / 255
    hidden, conditions = encoded(pipe, name)
    for step, timestep in enumerate(scheduler.timesteps):
        views = layout.at(step)
        total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for top in views.rows.starts:
            for left in views.columns.starts:
                view = crop(canvas, top, left, 8, 8).repeat(2, 1, 1, 1)
                seen = crop(pixels, 4 * top, 4 * left, 32, 32).repeat(2, 1, 1, 1)
                down, middle = pipe.controlnet(
                    view, timestep, hidden, seen, scale, added_cond_kwargs=conditions, return_dict=False
                )
                negative, positive = pipe.unet(
                    view, timestep, hidden, added_cond_kwargs=conditions,
                    down_block_additional_residuals=down, mid_block_additional_residual=middle,
                ).sample.chunk(2)  # fmt: skip
                noise = negative + CALL["guidance_scale"] * (positive - negative)
                for row in range(8):
                    for column in range(8):
                        place = (..., (top + row) % canvas.shape[2], (left + column) % canvas.shape[3])
                        total[place] += noise[..., row, column]
                        count[place] += 1
        canvas = scheduler.step(total / count, timestep, canvas).prev_sample
    return canvas


VIEWS = {
    "overlapping": ({}, (32, 64)),
    "loop": ({"loop": True}, (32, 64)),
    "grid": ({}, (48, 48)),
    "shifted": ({"layout": "shifted"}, (32, 64)),
    "shifted grid on a loop": ({"layout": "shifted", "loop": True}, (48, 64)),
}


@pytest.mark.parametrize(("name", "views"), combinations(FAMILIES, list(VIEWS), one_in=2))
def test_each_view_sees_its_part_of_the_control_picture(pipelines, name, views):
    options, (height, width) = VIEWS[views]
    layout, loop = options.get("layout", "overlapping"), options.get("loop", False)
    stride = 4 if layout == "overlapping" else None
    control = picture(height, width)
    views = build_layout(layout, height // 4, width // 4, 8, stride or 2, loop)
    theirs = view_by_view(pipelines[name][0], name, control, views, height, width)
    sampler = sampler_of(pipelines, name, layout=layout, stride=stride)
    ours = latents(sampler, [control], height=height, width=width, loop=loop)
    assert relative_error(ours, theirs) <= 1e-5
    in_chunks = latents(sampler, [control], height=height, width=width, loop=loop, chunk_views=2)
    assert relative_error(in_chunks, theirs) <= 1e-5


class MergedByHand:
    """Attention of views [2 * V, L, D] that are merged to the canvas, cell by cell."""

    def __init__(self, plain, starts, extent):
        self.plain, self.starts, self.extent = plain, starts, extent

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **options):
        side = round(hidden_states.shape[1] ** 0.5)
        factor = 8 // side
        starts, extent = [start // factor for start in self.starts], self.extent // factor
        states = hidden_states.unflatten(0, (2, len(starts))).unflatten(2, (side, side))
        canvas = hidden_states.new_zeros(2, side, extent, hidden_states.shape[2])
        count = hidden_states.new_zeros(extent)
        for index, start in enumerate(starts):
            canvas[:, :, start : start + side] += states[:, index]
            count[start : start + side] += 1
        canvas /= count[:, None]
        prompt = None if encoder_hidden_states is None else encoder_hidden_states[:: len(starts)]
        attended = self.plain(attn, canvas.flatten(1, 2), prompt, **options).unflatten(1, (side, extent))
        parts = [attended[:, :, start : start + side] for start in starts]
        return torch.stack(parts, 1).flatten(0, 1).flatten(1, 2)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_attention_merges_in_the_controlnet_as_in_the_unet(pipelines, name):
    pipe, starts = pipelines[name][0], (0, 4, 8)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(CALL["num_inference_steps"])
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float() / 255
    hidden, conditions = encoded(pipe, name)
    hidden = hidden.repeat_interleave(3, 0)
    conditions = conditions and {key: value.repeat_interleave(3, 0) for key, value in conditions.items()}
    views = torch.cat([crop(noise, 0, start, 8, 8) for start in starts]).repeat(2, 1, 1, 1)
    seen = torch.cat([crop(pixels, 0, 4 * start, 32, 32) for start in starts]).repeat(2, 1, 1, 1)
    timestep = scheduler.timesteps[0]

    def predict(merged):
        networks = {part: copy.deepcopy(getattr(pipe, part)) for part in ("unet", "controlnet")}
        for part in merged:
            plain = next(iter(networks[part].attn_processors.values()))
            networks[part].set_attn_processor(MergedByHand(plain, starts, 16))
        down, middle = networks["controlnet"](
            views, timestep, hidden, seen, added_cond_kwargs=conditions, return_dict=False
        )
        negative, positive = networks["unet"](
            views, timestep, hidden, added_cond_kwargs=conditions,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample.chunk(2)  # fmt: skip
        return negative + CALL["guidance_scale"] * (positive - negative)

    sampler = sampler_of(pipelines, name, mad_steps=4, stride=4)
    steps = []
    step = type(scheduler).step

    def recorded(self, noise, *arguments, **options):
        steps.append(noise)
        return step(self, noise, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(scheduler), "step", recorded)
        latents(sampler, [picture()])

    def average(parts):
        canvas, count = torch.zeros(1, 4, 8, 16), torch.zeros(16)
        for start, part in zip(starts, parts, strict=True):
            canvas[..., start : start + 8] += part
            count[start : start + 8] += 1
        return canvas / count

    assert relative_error(steps[0], average(predict(["unet", "controlnet"]))) <= 1e-5
    assert relative_error(steps[0], average(predict(["unet"]))) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_pipelines_sample_as_their_folders_and_stay_as_they_were(pipelines, name):
    pipe = pipelines[name][0]
    before = reference(pipe, picture())
    options = {"mad_steps": 2, "stride": 4}
    sampler = PanoramaSampler.from_pipe(pipe, overrides=["backbone.controlnet.scale=0.7"], **options)
    ours = latents(sampler, [picture()])
    theirs = latents(sampler_of(pipelines, name, "backbone.controlnet.scale=0.7", **options), [picture()])
    assert torch.equal(ours, theirs)
    assert torch.equal(reference(pipe, picture()), before)


def test_sampler_is_called_with_a_picture_for_each_prompt(pipelines):
    sampler = sampler_of(pipelines, "sd", layout="whole")
    call = {**SIZE, **CALL, "negative_prompt": NEGATIVE, "output_type": "latent"}
    ours = sampler(PROMPT, control_image=picture(), generator=torch.Generator().manual_seed(3), **call).images
    assert relative_error(ours, reference(pipelines["sd"][0], picture())) <= 1e-5
    twice = sampler([PROMPT, "the sea"], control_image=[picture(), picture()], num_images_per_prompt=2, **call).images
    assert len(twice) == 4


def test_regions_follow_the_picture_of_their_panorama(pipelines):
    """A region with the panorama's own prompt changes nothing."""
    sampler = sampler_of(pipelines, "sd", "method.regions.bootstrapping=0", mad_steps=1, stride=4)
    control = [picture(seed=1), picture(seed=2)]
    options = {**SIZE, **CALL, "seeds": [3, 4], "output": "latent"}
    plain = sampler.sample([PROMPT] * 2, control=control, **options)
    region = Region(Box(8, 0, 40, 20), PROMPT)
    assert (
        relative_error(sampler.sample([PROMPT] * 2, control=control, regions=[[region], []], **options), plain) <= 1e-5
    )
    alone = sampler.sample([PROMPT], control=control[1:], **{**options, "seeds": [4]})
    assert relative_error(alone[0], plain[1]) <= 1e-5


def test_guidance_in_some_steps_and_distilled_guidance(pipelines):
    sampler = sampler_of(pipelines, "sd", mad_steps=1, stride=4)
    some = latents(sampler, [picture()], guidance_steps=[0, 2], negative_prompts=[NEGATIVE])
    assert some.isfinite().all()
    assert relative_error(some, latents(sampler, [picture()])) > 1e-3
