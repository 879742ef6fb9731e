import json

import numpy as np
import pytest
from demo_backbone.scenes import Scene, caption, random_scene
from demo_backbone.train import main
from demo_backbone.train_clip import shows
from demo_backbone.train_transformer import main as train_transformer

from madgen.models import clip as _clip


@pytest.mark.slow
def test_trained_pipeline_is_loaded_by_madgen(tmp_path):
    """With two steps of each part the images are noise, but the folder is complete."""
    import torch

    from madgen import PanoramaSampler

    few = {"scenes": 16, "held-out": 8, "vae-batch": 4, "unet-batch": 4, "vae-steps": 2, "unet-steps": 2}
    few |= {"clip-steps": 2}
    few = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    main([str(tmp_path), *few, "--device", "cpu", "--clip", str(tmp_path / "clip")])
    assert (
        json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        == "StableDiffusionPipeline"
    )
    sampler = PanoramaSampler.from_pretrained(str(tmp_path), mad_steps=1, dtype="float32")
    latents = sampler.sample(
        ["dunes"], height=128, width=256, num_inference_steps=1, seeds=[0], guidance_scale=3.0, output="latent"
    )
    assert latents.shape == (1, 4, 16, 32)
    assert torch.isfinite(latents).all()
    score = _clip.load(str(tmp_path / "clip")).similarity(np.zeros((96, 96, 3), np.uint8), "dunes at noon")
    assert -1 <= score <= 1


@pytest.mark.slow
def test_training_of_the_transformer_is_resumed_and_loaded_as_flux(tmp_path):
    """Two steps of flow matching, then, in a second run, two that distill guidance."""
    import torch

    from madgen import PanoramaSampler

    few = [str(tmp_path), "--device", "cpu", "--scenes", "8", "--batch", "2", "--distill", "0.5"]
    train_transformer([*few, "--steps", "2"])
    first = torch.load(tmp_path / "training.pt", weights_only=True)
    assert first["step"] == 2
    train_transformer([*few, "--steps", "4"])
    second = torch.load(tmp_path / "training.pt", weights_only=True)
    assert second["step"] == 4
    assert all(torch.equal(second["teacher"][key], value) for key, value in first["teacher"].items())
    assert all(torch.isfinite(value).all() for value in second["model"].values())
    assert not torch.equal(second["model"]["x_embedder.weight"], first["model"]["x_embedder.weight"])
    overrides = ["backbone.max_sequence_length=24"]
    sampler = PanoramaSampler.from_pretrained(
        str(tmp_path), name="flux", view_size=16, mad_steps=1, overrides=overrides
    )
    latents = sampler.sample(["dunes"], height=128, width=256, num_inference_steps=1, seeds=[0], output="latent")
    assert latents.shape == (1, 4, 16, 32)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a landscape", True),
        ("hills over a meadow at sunrise", True),
        ("hills at dawn with clouds and a sun, low horizon", True),
        ("hills at noon", False),
        ("hills with trees", False),
        ("hills with a moon", False),
        ("a view, high horizon", False),
    ],
)
def test_caption_matches_scenes_with_its_attributes(text, fits):
    assert shows(Scene("dawn", "hills", "meadow", "low", sun=True, clouds=True), text) == fits


def test_captions_match_their_own_scene():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert shows(scene, caption(scene, rng))
