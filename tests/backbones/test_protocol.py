"""A backbone written from the protocols of `madgen.backbones` alone, in one file: plugins/gradient.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

import madgen.backbones
from madgen import Box, PanoramaSampler, Region, UserError, load_job
from madgen.backbones import Backbone, BackboneModule, Conditioning, backbone_module

PLUGINS = Path(__file__).parent / "plugins"
SIZE = {"height": 64, "width": 128, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(madgen.backbones, "__path__", [*madgen.backbones.__path__, str(PLUGINS)])


def public_functions(protocol):
    return {name for name, value in vars(protocol).items() if callable(value) and not name.startswith("_")}


def sampler(**options):
    return PanoramaSampler.from_pretrained("anything", name="gradient", stride=4, **options)


def test_the_plugin_implements_exactly_the_protocols():
    module = backbone_module("gradient")
    assert public_functions(BackboneModule) <= set(vars(module))
    assert public_functions(Backbone) == public_functions(module.Gradient)
    assert public_functions(Conditioning) == public_functions(module.Colors)
    assert "madgen.backbones._" not in (PLUGINS / "gradient.py").read_text(encoding="utf-8")


def test_plugin_samples_with_and_without_mad():
    merged, apart = (sampler(mad_steps=steps).sample(["a hill"], seeds=[1], **SIZE) for steps in (4, 0))
    assert merged.shape == apart.shape == (1, 64, 128, 3)
    assert merged.dtype == np.uint8
    assert not np.array_equal(merged, apart)
    prompts = sampler(mad_steps=4).sample(["a hill", "the sea"], seeds=[1, 1], **SIZE)
    assert np.array_equal(prompts[0], merged[0])
    assert not np.array_equal(prompts[0], prompts[1])


@pytest.mark.parametrize(
    "options",
    [
        {"loop": True},
        {"regions": [[Region(Box(0, 0, 64, 64), "a tree", "fog")]]},
        {"guidance_steps": (1, 3)},
        {"negative_prompts": ["fog"], "decode": "tiled", "chunk_views": 1},
    ],
    ids=str,
)
def test_plugin_samples_with_every_option(options):
    images = sampler().sample(["a hill"], seeds=[1], **SIZE, **options)
    assert images.std() > 0


@pytest.mark.slow
def test_syncdiffusion_runs_on_the_plugin():
    options = {"mad_steps": 0, "sync_network": "random", "scheduler": "DDIMScheduler"}
    run = {"seeds": [1], "output": "latent", **SIZE}
    plain, pulled = (sampler(sync_weight=weight, **options).sample(["a hill"], **run) for weight in (0.0, 20.0))
    assert torch.isfinite(pulled).all()
    assert not torch.equal(plain, pulled)


def test_errors_of_the_plugin_reach_the_user():
    with pytest.raises(UserError, match="unknown block 'left'"):
        sampler(mad_blocks=["left"])
    with pytest.raises(UserError, match="no network to compile"):
        sampler(compile=True)


def test_job_with_the_plugin_plans(tmp_path):
    from madgen.planning.forecast import forecast
    from madgen.planning.resolved_run import ResolvedRun

    (tmp_path / "prompts.txt").write_text("a hill\n", encoding="utf-8")
    (tmp_path / "job.yaml").write_text(
        f"backbone: {{name: gradient, pretrained: anything}}\nprompts: {{source: {tmp_path}/prompts.txt}}\n"
        "method: {views: {stride: 4}}\nsampling: {height: 64, width: 128, num_inference_steps: 4}\n",
        encoding="utf-8",
    )
    job = load_job(str(tmp_path / "job.yaml"))
    assert forecast(ResolvedRun.of(job)).shapes.views == {(64, 128): 3 * 7}
