"""Compare the merge operators with stored outputs of the released code of Guided Fusion (GVCF) and Mixture of
Diffusers, and with SaFa written out view by view."""

import ast
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from madgen import PanoramaSampler
from madgen.config.schema import (
    BackboneConfig,
    MadConfig,
    MergeConfig,
    MethodConfig,
    NoiseConfig,
    SamplingParams,
    ViewsConfig,
)
from madgen.diffusion.noise import align
from madgen.diffusion.operators import MergeOperator, gaussian_weights, radial_weights
from madgen.utils.seeding import generators, initial_noise

GOLDEN = Path(__file__).parent / "golden"


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if archive[key].dtype.kind == "f"}
        return arrays, ast.literal_eval(str(archive["meta"]))


@lru_cache(maxsize=4)  # the tests of one setting share a sampler
def sampler_of(stride, merge, noise, scheduler):
    return PanoramaSampler.from_configs(
        BackboneConfig(pretrained=str(GOLDEN / "tiny-sd"), dtype="float32"),
        MethodConfig(
            views=ViewsConfig(size=64, stride=stride), mad=MadConfig(steps=0), merge=merge, noise=noise,
        ),
        SamplingParams(scheduler=scheduler),
    )  # fmt: skip


def sample(meta, merge=MergeConfig(), noise=NoiseConfig()):  # noqa: B008
    return sampler_of(meta["stride"], merge, noise, meta["scheduler"]).sample(
        [meta["prompt"]],
        negative_prompts=[meta["negative"]],
        height=meta["height"],
        width=meta["width"],
        num_inference_steps=meta["steps"],
        guidance_scale=meta["guidance"],
        seeds=[meta["seed"]],
        loop=meta.get("loop", False),
        output="latent",
    )


def relative_error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.slow
def test_uniform_weights_equal_multidiffusion_of_guided_fusion():
    arrays, meta = load("gvcf_md_768")
    assert relative_error(sample(meta), arrays["latents"]) <= 1e-4


@pytest.mark.parametrize("name", [slow("gf_768_s16"), "gf_896_s48"])
def test_radial_weights_equal_guided_fusion(name):
    """The release divides 0 by 0 in the corner of the canvas; `latents` is its result without this fault."""
    arrays, meta = load(name)
    ours = sample(meta, MergeConfig(weights="radial"))
    assert relative_error(ours, arrays["latents"]) <= 1e-4
    assert relative_error(ours, arrays["latents_as_released"]) > 1e-3


@pytest.mark.parametrize("name", [slow("mod_768_s16"), "mod_640x640_s16"])
def test_gaussian_weights_equal_mixture_of_diffusers(name):
    arrays, meta = load(name)
    assert relative_error(sample(meta, MergeConfig(weights="gaussian")), arrays["latents"]) <= 1e-4


@pytest.mark.parametrize(("name", "size"), [("w512_h512", (64, 64)), ("w512_h768", (96, 64))])
def test_gaussian_weights_of_a_view(name, size):
    arrays, _ = load("mod_weights")
    torch.testing.assert_close(gaussian_weights(*size), arrays[f"weights_{name}"])


def test_radial_weights_of_a_view():
    weights = radial_weights(64, 64)
    assert (weights[32, 32], weights[0, 0]) == (1, 0)
    assert float(weights[63, 63]) == pytest.approx(1 / 32)
    assert (weights == 0).sum() == 1


@pytest.mark.parametrize("name", ["sa_1024_a01", "sa_1024_a05", "sa_1024_a10"])
def test_aligned_noise_equals_guided_fusion(name):
    arrays, meta = load(name)
    draws = generators([meta["seed"]])
    noise = align(initial_noise(draws, 4, 64, 128), initial_noise(draws, 4, 64, 64), meta["align"])
    torch.testing.assert_close(noise, arrays["noise"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [slow("sa_1024_a01"), "sa_1024_a05"])
def test_aligned_multidiffusion_equals_guided_fusion(name):
    arrays, meta = load(name)
    assert relative_error(sample(meta, noise=NoiseConfig(align=meta["align"])), arrays["latents"]) <= 1e-4


@pytest.mark.parametrize("name", [slow("vcf_640_s8"), "gvcf_640_s8"])
def test_ddpm_on_the_canvas_equals_variance_corrected_fusion(monkeypatch, name):
    """`eta` is the noise on the canvas that equals the release's noise of each view."""
    arrays, meta = load(name)
    draws = iter([*load(f"{name}_eta")[0]["eta"], torch.zeros(4, 64, 80)])  # the last has a deviation of 1e-10
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *arguments, **options: next(draws)[None]
    )
    assert relative_error(sample(meta, MergeConfig(weights=meta["weights"])), arrays["latents"]) <= 1e-4
    assert next(draws, None) is None


@pytest.mark.parametrize("name", [slow("vcf_640_s8"), "gvcf_640_s8"])
def test_first_ddpm_step_has_the_mean_and_variance_of_variance_corrected_fusion(monkeypatch, name):
    """The step is its mean plus the deviation times one unit noise, with any number of views on a cell."""
    arrays, meta = load(f"{name}_law")
    noise = torch.randn(1, 4, 64, 80, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *arguments, **options: noise)
    stepped = []

    def after_step(self, latents, views, step):
        stepped.append(latents)
        raise KeyboardInterrupt

    monkeypatch.setattr(MergeOperator, "after_step", after_step)
    with pytest.raises(KeyboardInterrupt):
        sample(meta, MergeConfig(weights=meta["weights"]))
    assert relative_error(stepped[0], arrays["mu"] + meta["sigma"] * noise) <= 1e-5


@pytest.mark.parametrize("name", [slow("safa_896_ov16"), "safa_896_ov16_ref2", slow("safa_768_ov32")])
def test_swap_equals_safa(name):
    arrays, meta = load(name)
    merge = MergeConfig(operator="swap", width=meta["interval"], reference_steps=meta["ref_steps"])
    assert relative_error(sample(meta, merge), arrays["latents"]) <= 1e-4
