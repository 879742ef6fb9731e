"""Single files of FLUX.1 and Stable Diffusion 3 in their original layout, alone or with other models."""

import json
import shutil

import pytest
import torch
from ldm_layout import vae_tensors
from original_layout import convert_width, flux_tensors, sd3_tensors
from safetensors.torch import save_file
from tiny_transformers import folder_of, pipeline_of

from madgen import PanoramaSampler, UserError
from madgen.backbones import backbone_module
from madgen.hub.weights import ModelFiles

TENSORS = {"flux": flux_tensors, "sd3": sd3_tensors}
RUN = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 3.0, "output": "latent", "seeds": [4]}


@pytest.fixture(autouse=True)
def width(monkeypatch):
    config = pipeline_of("flux").transformer.config
    convert_width(monkeypatch, config.num_attention_heads * config.attention_head_dim)


def saved(tensors, path):
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def original(name):
    """Return the tensors of the tiny transformer, each changed, so that it differs from the one in the folder."""
    return {key: value * 1.25 for key, value in TENSORS[name](pipeline_of(name).transformer).items()}


def load(file, name, config=None, **options):
    options = {"dtype": "float32", "view_size": 16, "stride": 8, "mad_steps": 1, **options}
    return PanoramaSampler.from_pretrained(str(file), name=name, config=config and str(config), **options)


def expected(name, folder):
    """Save the tiny pipeline with the changed transformer as a folder."""
    shutil.copytree(folder_of(name), folder)
    transformer = type(pipeline_of(name).transformer).from_pretrained(folder, subfolder="transformer")
    with torch.no_grad():
        for value in [*transformer.parameters(), *transformer.buffers()]:
            value *= 1.25
    transformer.save_pretrained(folder / "transformer")
    return folder


def assert_same_models(ours, theirs):
    for one, other in zip(ours.backbone.models, theirs.backbone.models, strict=True):
        mine, reference = one.state_dict(), other.state_dict()
        assert set(mine) == set(reference)
        assert all(torch.equal(mine[key], reference[key]) for key in reference)
        assert {value.dtype for value in mine.values()} == {value.dtype for value in reference.values()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_transformer_alone_takes_the_other_models_from_its_config(name, prefix, tmp_path):
    file = saved({prefix + key: value for key, value in original(name).items()}, tmp_path / "one.safetensors")
    ours = load(file, name, folder_of(name))
    theirs = load(expected(name, tmp_path / "folder"), name)
    assert_same_models(ours, theirs)
    # The files align weights differently, by which MKL selects kernels on some processors: other last bits.
    torch.testing.assert_close(ours.sample(["a hill"], **RUN), theirs.sample(["a hill"], **RUN), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_the_file_replace_those_of_its_config(dtype, tmp_path):
    pipe = pipeline_of("flux")
    tensors = {f"model.diffusion_model.{key}": value for key, value in original("flux").items()}
    tensors |= {f"vae.{key}": value * 0.75 for key, value in vae_tensors(pipe.vae).items()}
    clip, t5 = pipe.text_encoder.state_dict(), pipe.text_encoder_2.state_dict()
    clip = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in clip.items()}
    tensors |= {f"text_encoders.clip_l.transformer.{key}": value * 0.5 for key, value in clip.items()}
    t5.pop("encoder.embed_tokens.weight", None)  # the same tensor as `shared.weight`
    tensors |= {f"text_encoders.t5xxl.transformer.{key}": value * 2 for key, value in t5.items()}
    backbone = load(saved(tensors, tmp_path / "all.safetensors"), "flux", folder_of("flux"), dtype=dtype).backbone
    reference = load(folder_of("flux"), "flux", dtype=dtype).backbone
    models = [backbone.network, backbone.vae, *backbone.text_encoders]
    references = [reference.network, reference.vae, *reference.text_encoders]
    for factor, model, other in zip((1.25, 0.75, 0.5, 2), models, references, strict=True):
        theirs = other.state_dict()
        assert set(theirs) == set(model.state_dict())
        for key, value in model.state_dict().items():
            assert value.dtype == theirs[key].dtype
            assert torch.allclose(value, theirs[key] * factor, rtol=1e-2), key


def test_a_file_with_a_vae_takes_its_text_encoders_from_its_config(tmp_path):
    pipe = pipeline_of("sd3")
    tensors = {f"model.diffusion_model.{key}": value for key, value in original("sd3").items()}
    tensors |= {f"first_stage_model.{key}": value * 0.75 for key, value in vae_tensors(pipe.vae).items()}
    ours = load(saved(tensors, tmp_path / "sd3.safetensors"), "sd3", folder_of("sd3")).backbone
    theirs = load(folder_of("sd3"), "sd3").backbone
    assert torch.equal(ours.vae.decoder.conv_in.weight, theirs.vae.decoder.conv_in.weight * 0.75)
    for one, other in zip(ours.text_encoders, theirs.text_encoders, strict=True):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_what_neither_the_file_nor_its_config_has_is_named(tmp_path):
    file = saved(original("flux"), tmp_path / "one.safetensors")
    config = shutil.copytree(folder_of("flux"), tmp_path / "config")
    for weights in config.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(
        UserError, match=r"one\.safetensors has no text_encoder and no text_encoder_2 and no vae, which"
    ):
        load(file, "flux", config)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_its_size_counts_the_models_of_its_config(name, tmp_path):
    file = saved(original(name), tmp_path / "one.safetensors")
    folder = str(folder_of(name))
    module = backbone_module(name)
    single = module.size(ModelFiles(str(file), None, folder), None)
    whole = module.size(ModelFiles(folder), None)
    assert single.network.total == whole.network.total
    assert (single.vae, single.text_encoders) == (whole.vae, whole.text_encoders)


def test_the_command_line_generates_from_a_single_file(madgen_here, tmp_path):
    file = saved(original("sd3"), tmp_path / "one.safetensors")
    (tmp_path / "prompts.txt").write_text("a hill\n")
    (tmp_path / "job.yaml").write_text(
        f"""
backbone: {{name: sd3, pretrained: {json.dumps(str(file))}, config: {json.dumps(str(folder_of("sd3")))}}}
method: {{views: {{size: 16, stride: 8}}, mad: {{steps: 1}}}}
sampling: {{height: 32, width: 48, num_inference_steps: 2}}
prompts: {{source: prompts.txt}}
output: {{dir: out}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu, devices: 1}}
"""
    )
    assert madgen_here("generate", "job.yaml").code == 0
    assert madgen_here("verify", "out").code == 0
