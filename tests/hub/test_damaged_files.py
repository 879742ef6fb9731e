"""Weight files that are something else are named as what they are, with what to do."""

import gzip
import shutil

import pytest
import torch
from safetensors.torch import save

from madgen import PanoramaSampler, UserError
from madgen.hub.model_configs import read_configs
from madgen.hub.safetensors_file import damaged_file, read_header
from madgen.hub.weights import ModelFiles
from madgen.models import clip, safety_checker

GOOD = save({"weight": torch.zeros(4, 4)}, {"format": "pt"})
LENGTH = int.from_bytes(GOOD[:8], "little")
DAMAGED = {
    "empty": (b"", "is empty; download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in", "web page"),
    "html in upper case": (b"\xef\xbb\xbf<HTML>", "web page"),
    "json": (b'{"error": "Repository not found"}', "JSON text"),
    "truncated data": (GOOD[:-1], rf"truncated: it has {len(GOOD) - 1} of {len(GOOD)} bytes"),
    "truncated header": (GOOD[:40], "truncated: it has 40 bytes, its header alone needs"),
    "truncated length": (GOOD[:5], "truncated: it has 5 bytes"),
    "longer": (GOOD + b"abc", "3 bytes more than"),
    "gzip": (gzip.compress(GOOD), "compressed with gzip; unpack it"),
    "big-endian": (LENGTH.to_bytes(8, "big") + GOOD[8:], r"wrong byte order \(big-endian\)"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive, as PyTorch saves pickles"),
    "pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00", "a pickle, which can run code"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "zeros": (bytes(100), "not a safetensors file"),
    "list": (b"\x02" + bytes(7) + b"[]", "not a JSON object"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_no_safetensors_is_named(content, message, tiny, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for call in (
        lambda: read_header(file, "backbone.pretrained=model.safetensors"),
        lambda: read_configs(ModelFiles(str(file), None, str(tiny))),
        lambda: read_configs(ModelFiles(str(file), None, None)),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "madgen fetch" not in str(caught.value)


def test_a_complete_file_has_no_problem(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert damaged_file(tmp_path) is None
    assert read_header(tmp_path / "model.safetensors", "it").metadata == {"format": "pt"}


@pytest.mark.parametrize("kind", ["lfs", "html", "truncated data", "pickle"])
def test_a_damaged_component_is_named(kind, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    content, message = DAMAGED[kind]
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"vae/diffusion_pytorch_model.safetensors is .*{message[-12:]}") as caught:
        PanoramaSampler.from_pretrained(str(folder))
    assert "madgen fetch" not in str(caught.value)


def test_a_component_config_that_is_a_pointer_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "unet/config.json").write_bytes(DAMAGED["lfs"][0])
    with pytest.raises(UserError, match=r"unet/config.json is a Git LFS pointer"):
        PanoramaSampler.from_pretrained(str(folder))


def test_plan_names_a_damaged_lora(madgen_here, job_file, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(DAMAGED["lfs"][0])
    result = madgen_here("plan", job_file, "backbone.loras=[{weights: style.safetensors}]")
    assert (result.code, "the LoRA style.safetensors is a Git LFS pointer" in result.err) == (2, True)


def test_damaged_clip_models_and_safety_checkers_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED["html"][0])
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    for module, config in (
        (clip, '{"model_type": "clip", "architectures": ["CLIPModel"]}'),
        (safety_checker, '{"architectures": ["StableDiffusionSafetyChecker"]}'),
    ):
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
        with pytest.raises(UserError, match=r"model.safetensors is a web page"):
            module.load(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first_stage_model.", "cond_stage_model.transformer.text_model."], "lacks its UNet"),
        (["model.diffusion_model.", "cond_stage_model.transformer.text_model."], "lacks its VAE"),
        (["model.diffusion_model.", "first_stage_model."], "lacks its text encoder;"),
        (
            ["model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.embeddings."],
            "old merges call it cond_stage_model",
        ),
        (["input_blocks.0."], "is a bare UNet"),
        (["down_blocks.0."], "is a bare UNet"),
        (["lora_unet_x."], "has no tensors of Stable Diffusion's original layout"),
    ],
)
def test_parts_that_a_single_file_lacks_are_named(names, message, tiny, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(save({f"{name}weight": torch.zeros(1) for name in names}))
    with pytest.raises(UserError, match=message):
        read_configs(ModelFiles(str(file), None, str(tiny)))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", b"[]", "model_index.json must be a JSON object, got list"),
        ("model_index.json", None, "is a folder without model_index.json: not a diffusers pipeline"),
        ("unet/config.json", DAMAGED["lfs"][0], "unet/config.json is a Git LFS pointer"),
        ("vae/config.json", b'{"a": ', "vae/config.json is not valid JSON"),
    ],
)
def test_plan_names_a_damaged_config(file, content, message, madgen_here, job_file, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    result = madgen_here("plan", job_file, "backbone.pretrained=model")
    assert (result.code, message in result.err) == (2, True), result.err


@pytest.mark.parametrize("kind", ["lfs", "html", "empty", "truncated data"])
def test_plan_names_a_damaged_single_file(kind, madgen_here, job_file, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[kind][0])
    result = madgen_here("plan", job_file, "backbone.pretrained=model.safetensors")
    assert (result.code, "backbone.pretrained=model.safetensors is" in result.err) == (2, True), result.err
