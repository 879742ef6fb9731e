"""Quantized weights of transformers: those of diffusers, part of the fingerprint, refused where they cannot apply."""

import json

import pytest
import torch
from test_transformer_jobs import CONFIGS, tiny_overrides
from tiny_transformers import error, folder_of

from madgen import PanoramaSampler, UserError
from madgen.config.schema import BackboneConfig, LoraConfig

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}


def load(**options):
    return PanoramaSampler.from_pretrained(str(folder_of("qwen_image")), name="qwen_image", dtype="float32", **options)


def latents(sampler, **options):
    return sampler.sample(["a city"], seeds=[3], output="latent", **{**SIZE, **options})


def test_int8_weights_are_those_of_diffusers():
    torchao = pytest.importorskip("torchao.quantization", reason="needs the extra quant")
    import diffusers

    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())}
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder_of("qwen_image"), quantization_config=config, dtype=torch.float32
    )
    packed = pipe(
        prompt="a city", height=32, width=32, num_inference_steps=2, true_cfg_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    expected = pipe._unpack_latents(packed, 32, 32, pipe.vae_scale_factor)[:, :, 0]
    quantized = load(layout="whole", mad_steps=0, overrides=["backbone.quantization=int8"])
    assert error(latents(quantized), expected) <= 1e-5
    assert error(latents(load(layout="whole", mad_steps=0)), expected) > 1e-3
    assert not quantized.has_lower_precision  # nothing to gain in float32


def test_mad_runs_on_quantized_weights():
    pytest.importorskip("torchao.quantization", reason="needs the extra quant")
    views = ["method.views.size=16", "method.views.stride=8", "backbone.quantization=int8"]
    merged, plain = (latents(load(mad_steps=steps, overrides=views), width=64) for steps in (2, 0))
    assert torch.isfinite(merged).all()
    assert error(merged, plain) > 1e-3


def plan(madgen_here, *overrides):
    job = [CONFIGS / "qwen-image.yaml", *tiny_overrides(2, folder_of("qwen_image")), *overrides]
    return madgen_here("plan", *job, "--json")


def test_a_missing_package_is_named_before_anything_is_written(madgen_here, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the sea\n", encoding="utf-8")
    monkeypatch.setattr("madgen.backbones._loading.find_spec", lambda name: None)
    result = plan(madgen_here, "backbone.quantization=nf4")
    assert result.code == 2
    assert result.err == (
        "madgen: backbone.quantization=nf4 needs the package bitsandbytes: pip install 'madgen[quant]', or set it to "
        "null\n"
    )
    assert json.loads(plan(madgen_here).out)["samples"] == 1
    assert not (tmp_path / "out").exists()


def test_quantization_is_part_of_the_identity_of_a_dataset(tmp_path):
    from madgen.config.loader import load_job
    from madgen.planning.resolved_run import ResolvedRun

    (tmp_path / "prompts.txt").write_text("the sea\n", encoding="utf-8")
    preset, overrides = CONFIGS / "qwen-image.yaml", tiny_overrides(2, folder_of("qwen_image"))
    overrides += [f"prompts.source={tmp_path}/prompts.txt", f"output.dir={tmp_path}/out"]
    jobs = [load_job([preset], [*overrides, f"backbone.quantization={kind}"]) for kind in ("null", "int8")]
    plain, quantized = (ResolvedRun.of(job).on("cpu").manifest.identity["backbone"] for job in jobs)
    assert "quantization" not in plain
    assert quantized == plain | {"quantization": "int8"}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_quantization_of_unets_is_refused(tiny, tiny_xl, name):
    folder = tiny if name == "sd" else tiny_xl
    with pytest.raises(UserError, match=r"backbone\.quantization=int8 is not supported for UNets; set it to null"):
        PanoramaSampler.from_pretrained(str(folder), name=name, overrides=["backbone.quantization=int8"])


def test_settings_that_exclude_quantization_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"backbone\.quantization must be one of nf4, int8, fp8, got 'int4'"):
        BackboneConfig(quantization="int4")
    with pytest.raises(UserError, match=r"quantization=int8 is not possible with backbone\.loras"):
        BackboneConfig(quantization="int8", loras=[LoraConfig(weights="style.safetensors")])
    from madgen.backbones.flux import Flux

    file = tmp_path / "flux.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"is not supported for the single file .*flux\.safetensors; use a diffusers"):
        Flux.check_quantization("int8", str(file))
