"""Packaged weights: small, in diffusers layout, with images that match their captions."""

import itertools
import json

import numpy as np
import pytest
import torch
from demo_backbone.data import render
from demo_backbone.scenes import FARS, GROUNDS, HORIZONS, TIMES, Scene, draw, is_held_out

from madgen import PanoramaSampler
from madgen.demo import BACKBONES, WEIGHTS
from madgen.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "pipeline", "network", "megabytes"),
    [("demo", "StableDiffusionPipeline", "unet", 20), ("demo-dit", "FluxPipeline", "transformer", 12)],
)
def test_weights_are_a_small_pipeline_folder(name, pipeline, network, megabytes):
    folder = BACKBONES[name]
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    assert parts >= {network, "vae", "text_encoder", "tokenizer", "scheduler"}
    assert json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"] == pipeline
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= megabytes * 1e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md"}


def test_diffusers_pipeline_loads_and_runs():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("dunes at noon", num_inference_steps=2, height=128, width=128, output_type="np").images[0]
    assert image.shape == (128, 128, 3)


def test_demo_transformer_equals_diffusers_pipeline():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(BACKBONES["demo-dit"], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        "dunes at noon", num_inference_steps=3, guidance_scale=3.0, height=128, width=256, output_type="np",
        max_sequence_length=24, latents=pipeline._pack_latents(noise, 1, 4, 16, 32),
    ).images[0]  # fmt: skip
    sampler = PanoramaSampler.from_pretrained("demo-dit", name="flux", dtype="float32", layout="whole", mad_steps=0)
    actual = sampler(
        "dunes at noon", num_inference_steps=3, guidance_scale=3.0, height=128, width=256, output_type="np",
        latents=noise,
    ).images[0]  # fmt: skip
    assert np.abs(actual - expected).max() <= 1 / 255


def test_demo_transformer_has_the_size_of_its_views_and_prompts():
    sampler = PanoramaSampler.from_pretrained("demo-dit", name="flux", dtype="float32")
    assert (sampler.geometry.view_size, sampler.geometry.stride) == (16, 4)
    assert sampler.backbone.max_sequence_length == 24
    too_long = ["backbone.max_sequence_length=25"]
    with pytest.raises(UserError, match=r"backbone.max_sequence_length=25 must be in 1..24 tokens; null is 24"):
        PanoramaSampler.from_pretrained("demo-dit", name="flux", overrides=too_long)


@pytest.mark.slow
def test_autoencoder_reconstructs_held_out_scenes_at_26_db():
    from demo_backbone.train_vae import psnr
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae")
    assert psnr(vae, render(64, 7, held_out=True).images, torch.device("cpu")) >= 26


def profile(image):
    """Return the color of each row [H, 3]: medians over columns, robust to trees and clouds."""
    return np.median(image.astype(np.float32), axis=1)


@pytest.fixture(scope="module")
def templates():
    """Row colors of two rendered scenes for every combination of attributes."""
    scenes = 2 * [Scene(*values) for values in itertools.product(TIMES, FARS, GROUNDS, HORIZONS)]
    images = (draw(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes))
    return scenes, np.stack([profile(image) for image in images])


def classify(image, templates):
    """Return the rendered scene with the most similar row colors."""
    scenes, profiles = templates
    return scenes[int(np.abs(profiles - profile(image)).mean(axis=(1, 2)).argmin())]


@pytest.mark.slow
def test_classifier_recognizes_rendered_scenes(templates):
    pictures = render(64, 3)
    guesses = [classify(image, templates) for image in pictures.images]
    for name in ("time", "ground", "horizon"):
        right = [getattr(a, name) == getattr(b, name) for a, b in zip(guesses, pictures.scenes, strict=True)]
        assert np.mean(right) >= 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize(("pretrained", "name"), [("demo", "sd"), ("demo-dit", "flux")])
def test_images_match_held_out_captions(templates, pretrained, name):
    held_out = [Scene(*values) for values in itertools.product(TIMES, FARS, GROUNDS, HORIZONS)]
    held_out = [scene for scene in held_out if is_held_out(scene)]
    scenes = [held_out[index % len(held_out)] for index in range(32)]
    captions = [f"{s.far} over a {s.ground} at {s.time}, {s.horizon} horizon" for s in scenes]
    sampler = PanoramaSampler.from_pretrained(pretrained, name=name, dtype="float32")
    images = np.concatenate(
        [
            sampler.sample(captions[start : start + 16], height=128, width=128, num_inference_steps=10,
                           guidance_scale=3.0, seeds=range(start, start + 16))
            for start in range(0, 32, 16)
        ]
    )  # fmt: skip
    guesses = [classify(image, templates) for image in images]
    for kind in ("time", "ground", "horizon"):
        right = [getattr(guess, kind) == getattr(scene, kind) for guess, scene in zip(guesses, scenes, strict=True)]
        assert np.mean(right) >= 0.9, (kind, np.mean(right))
