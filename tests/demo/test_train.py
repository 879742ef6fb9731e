import json

import numpy as np
import pytest
from demo_backbone.train import main
from demo_backbone.train_clip import shows

from madgen.demo.scenes import Scene, caption, random_scene
from madgen.models import clip as _clip


@pytest.mark.slow
def test_trained_pipeline_is_loaded_by_madgen(tmp_path):
    """With two steps of each part the images are noise, but the folder is complete."""
    import torch

    from madgen import PanoramaSampler

    few = {"scenes": 48, "vae-steps": 2, "vae-batch": 4, "unet-steps": 2, "unet-batch": 4, "clip-steps": 2}
    few = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    main([str(tmp_path), *few, "--device", "cpu", "--clip", str(tmp_path / "clip")])
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    sampler = PanoramaSampler.from_pretrained(str(tmp_path), mad_steps=1, dtype="float32")
    latents = sampler.sample(
        ["dunes"], height=128, width=256, num_inference_steps=1, seeds=[0], guidance_scale=3.0, output="latent"
    )
    assert latents.shape == (1, 4, 16, 32)
    assert torch.isfinite(latents).all()
    score = _clip.load(str(tmp_path / "clip")).similarity(np.zeros((96, 96, 3), np.uint8), "dunes at noon")
    assert -1 <= score <= 1


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
