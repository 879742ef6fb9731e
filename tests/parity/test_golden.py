"""Compare with stored outputs of other implementations: the released MAD code and diffusers' pipelines."""

import ast
import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import madgen.sampling.noise
from madgen import PanoramaSampler, Region
from madgen.types import MaskPicture

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return torch.from_numpy(archive["latents"]), ast.literal_eval(str(archive["meta"]))


def sample(meta, folder, guidance_scale, negative, **method):
    sampler = PanoramaSampler.from_pretrained(str(GOLDEN / folder), dtype="float32", **method)
    return sampler.sample(
        [meta["prompt"]],
        negative_prompts=[negative],
        height=meta["height"],
        width=meta["width"],
        num_inference_steps=meta.get("steps") or meta["num_inference_steps"],
        guidance_scale=guidance_scale,
        seeds=[meta["seed"]],
        output="latent",
    )


def relative_error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", ["sd_768_tau0", "sd_768_tau2"])
def test_mad_equals_the_released_code_on_stable_diffusion(name):
    reference, meta = load(name)
    ours = sample(
        meta, "tiny-sd", meta["guidance"], meta["negative"],
        view_size=64, stride=meta["stride"], mad_steps=meta["tau"], cross_attention="always",
    )  # fmt: skip
    assert relative_error(ours, reference) <= 1e-4


@pytest.mark.slow
def test_mad_equals_the_released_code_on_stable_diffusion_xl():
    reference, meta = load("sdxl_1280_tau2")
    ours = sample(
        meta, "tiny-xl", meta["guidance"], meta["negative"], name="sdxl", scheduler="DDIMScheduler",
        view_size=128, stride=meta["stride"], mad_steps=meta["tau"], cross_attention="always",
    )  # fmt: skip
    assert relative_error(ours, reference) <= 1e-4


def test_mad_equals_the_released_code_on_a_latent_consistency_model():
    reference, meta = load("lcm_768_tau2")
    ours = sample(  # the release feeds the guidance itself into the embedding, diffusers and we feed guidance_scale - 1
        meta, "tiny-lcm", meta["guidance"] + 1, "",
        view_size=64, stride=meta["stride"], mad_steps=meta["tau"], cross_attention="always",
    )  # fmt: skip
    assert relative_error(ours, reference) <= 1e-4


def test_multidiffusion_equals_the_diffusers_panorama_pipeline():
    reference, meta = load("md_640_flat")
    ours = sample(
        meta, "tiny-sd", meta["guidance_scale"], meta["negative_prompt"],
        view_size=64, stride=meta["stride"], mad_steps=0,
    )  # fmt: skip
    assert relative_error(ours, reference) <= 1e-4


def test_whole_layout_equals_the_diffusers_pipeline():
    reference, meta = load("direct_768")
    ours = sample(meta, "tiny-sd", meta["guidance_scale"], meta["negative_prompt"], layout="whole", mad_steps=0)
    assert relative_error(ours, reference) <= 1e-4


@pytest.mark.slow
def test_syncdiffusion_equals_the_released_code():
    """The reference was computed in float64: gradients through VGG16, decoder and UNet magnify float32 rounding."""
    reference, meta = load("sync_768")
    ours = sample(
        meta, "tiny-sd", meta["guidance"], meta["negative"],
        view_size=64, stride=meta["stride"], mad_steps=0, sync_network="random", sync_weight=meta["sync_weight"],
        sync_decay=meta["sync_decay"], sync_steps=meta["sync_steps"], sync_every=meta["sync_every"],
    )  # fmt: skip
    assert relative_error(ours, reference) <= 1e-4


def as_mask(mask_HW):
    """Return a mask of latent cells as a PNG mask at 8 pixels per cell."""
    pixels = np.repeat(np.repeat(mask_HW.astype(np.uint8) * 255, 8, 0), 8, 1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return MaskPicture(base64.b64encode(stream.getvalue()).decode())


def test_regions_equal_the_released_code(monkeypatch):
    """The release computes its bootstrapping and does not use it."""
    reference, meta = load("regions_768")
    with np.load(GOLDEN / "regions_768.npz") as archive:
        masks, noise = archive["masks"], torch.from_numpy(archive["noise"])
    monkeypatch.setattr(madgen.sampling.noise, "initial_noise", lambda *arguments: noise)
    sampler = PanoramaSampler.from_pretrained(
        str(GOLDEN / "tiny-sd"), dtype="float32", view_size=64, stride=meta["stride"], mad_steps=meta["tau"],
        cross_attention="always", region_bootstrapping=0,
    )  # fmt: skip
    regions = [
        Region(as_mask(mask[0]), text, negative)
        for mask, text, negative in zip(masks[1:], meta["prompts"][1:], meta["negatives"][1:], strict=True)
    ]
    ours = sampler.sample(
        meta["prompts"][:1], negative_prompts=meta["negatives"][:1], height=meta["height"], width=meta["width"],
        num_inference_steps=meta["steps"], guidance_scale=meta["guidance"], seeds=[0], regions=[regions],
        output="latent",
    )  # fmt: skip
    assert relative_error(ours, reference) <= 1e-4


@pytest.mark.slow
def test_modes_of_cross_attention_differ():
    _, meta = load("sd_768_tau2")
    method = {"view_size": 64, "stride": meta["stride"], "mad_steps": meta["tau"]}
    modes = [
        sample(meta, "tiny-sd", meta["guidance"], meta["negative"], cross_attention=mode, **method)
        for mode in ("scheduled", "always")
    ]
    assert relative_error(*modes) > 1e-3
