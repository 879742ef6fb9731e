"""`madgen sample`: seeds, several panoramas, and what it prints."""

import json

import numpy as np
from PIL import Image

SMALL = ("sampling.width=256", "sampling.num_inference_steps=2", "method.mad.steps=1", "trainer.accelerator=cpu")


def pixels(path):
    return np.asarray(Image.open(path))


def test_num_samples_have_consecutive_seeds(madgen, tmp_path):
    made = madgen("sample", "a hill", *SMALL, "--seed", "7", "-n", "2", "-o", "hill.png")
    assert made.code == 0, made.err
    assert made.out.split() == ["hill-1.png", "hill-2.png"]
    alone = madgen("sample", "a hill", *SMALL, "prompts.seed=8", "-o", "alone.png")
    assert alone.code == 0, alone.err
    assert np.array_equal(pixels(tmp_path / "hill-2.png"), pixels(tmp_path / "alone.png"))
    assert not np.array_equal(pixels(tmp_path / "hill-1.png"), pixels(tmp_path / "hill-2.png"))
    for number in (1, 2):
        embedded = json.loads(Image.open(tmp_path / f"hill-{number}.png").text["parameters"])
        assert embedded["seed"] == 6 + number


def test_seeds_beyond_the_range_are_refused(madgen, tmp_path):
    refused = madgen("sample", "a hill", *SMALL, "--seed", str(2**64 - 1), "-n", "2")
    assert (refused.code, "above 2^64 - 1" in refused.err) == (2, True)
    assert not list(tmp_path.glob("panorama*"))


def test_presets_and_overrides_apply_in_order(madgen_here, tmp_path):
    from madgen import load_job
    from madgen.generation.single_image import load_sample_job

    plain = load_sample_job(None, [], None)
    assert (plain.backbone.pretrained, plain.sampling.width, plain.method.mad.steps) == ("demo", 768, 15)
    job = load_sample_job(None, ["spotdiffusion", "sampling.width=512"], 3)
    assert (job.method.views.layout, job.method.mad.steps, job.sampling.width) == ("shifted", 0, 512)
    assert (job.backbone, job.prompts.seed) == (plain.backbone, 3)
    assert load_sample_job(None, ["sd2", "mad"], None).sampling == load_job(["sd2", "mad"]).sampling
    refused = madgen_here("sample", "a hill", "spotdifusion")
    assert (refused.code, "did you mean 'spotdiffusion'?" in refused.err) == (2, True)


def test_a_prompt_without_quotes_is_named(madgen_here, tmp_path):
    result = madgen_here("sample", "a", "red", "desert", "-o", "x.png")
    assert result.code == 2
    assert result.err.rstrip().endswith("put a prompt of several words into quotes")
    assert not (tmp_path / "x.png").exists()
