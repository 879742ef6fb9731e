"""IP-Adapters in jobs: files, style pictures of prompt lines, refusals, records and reproduction."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from picture_jobs import noise_picture, samples_of, write_picture_job, write_prompts
from PIL import Image
from safetensors.torch import save_file

from madgen import PanoramaSampler, UserError, load_job
from madgen.dataset import manifest
from madgen.dataset.plan import build_plan
from madgen.hub.license import licences


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """Save an IP-Adapter of random weights for the tiny backbone, in the folders of published ones."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(tiny, subfolder="unet")
    width, folder = unet.config.cross_attention_dim, tmp_path_factory.mktemp("adapter") / "files"
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "models/image_encoder")
    state = {
        "image_proj.proj.weight": torch.randn(4 * width, 8),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.rand(width),
        "image_proj.norm.bias": torch.randn(width),
    }
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(layers):
        for part in ("to_k_ip", "to_v_ip"):
            size = unet.get_submodule(name).to_q.out_features
            state[f"ip_adapter.{2 * index + 1}.{part}.weight"] = torch.randn(size, width)
    save_file(state, folder / "models/adapter.safetensors")
    return folder


@pytest.fixture
def style_job(job_file, adapter):
    """Write a job of 3 prompts with style pictures, 2 samples each."""
    return write_picture_job(job_file, "style", f"ip_adapter: {{weights: {adapter}, subfolder: models}}")


def sampler_of(tiny, adapter, *overrides):
    overrides = [f"backbone.ip_adapter={{weights: {adapter}, subfolder: models}}", *overrides]
    return PanoramaSampler.from_pretrained(str(tiny), mad_steps=1, dtype="float32", overrides=overrides)


def sample(sampler, style):
    size = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output": "latent"}
    return sampler.sample(["a hill"], seeds=[1], style=style, **size)


def test_dataset_follows_the_pictures_and_regenerates_its_samples(madgen_here, style_job, tmp_path, tiny, adapter):
    assert madgen_here("generate", style_job).code == 0
    record, image = samples_of(tmp_path / "out")["2", 1]
    assert sorted(record["backbone"]["ip_adapter"]) == ["id", "scale"]
    assert str(tmp_path) not in json.dumps(record)
    assert str(adapter) not in json.dumps(record)
    direct = sampler_of(tiny, adapter).sample(
        [record["prompt"]], seeds=[record["seed"]], style=[noise_picture(2)], height=32, width=64,
        num_inference_steps=2, guidance_scale=2.0,
    )  # fmt: skip
    assert np.abs(direct[0].astype(int) - image).max() <= 1
    assert madgen_here("preview", "out").code == 0
    page = (tmp_path / "out/preview.html").read_text(encoding="utf-8")
    assert len(re.findall(r'"caption": ?"Style picture", ?"picture": ?"data:image/webp', page)) == 6
    (tmp_path / "style2.png").rename(tmp_path / "elsewhere.png")
    again = madgen_here("regenerate", "out", record["key"], "-o", "again.png", "--style", "elsewhere.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    assert madgen_here("verify", "out").code == 0
    single = madgen_here(
        "sample", record["prompt"], "--job", style_job, "--style", "elsewhere.png", "--seed", record["seed"], "-o",
        "single.png",
    )  # fmt: skip
    assert single.code == 0, single.err
    assert np.abs(np.array(Image.open(tmp_path / "single.png")).astype(int) - direct[0].astype(int)).max() <= 1


REFUSED = [
    ({"style": None}, [], "prompts.jsonl:2: no style picture; an IP-Adapter follows a picture of each row"),
    ({"style": "none.png"}, [], "prompts.jsonl:2: style file none.png does not exist"),
    ({"style": "prompts.jsonl"}, [], "prompts.jsonl:2: cannot read the style"),
    (
        {},
        ["backbone.ip_adapter.weights=null"],
        "prompts.jsonl:1: the field 'style' has no effect without backbone.ip_ad",
    ),
    ({}, ["backbone.ip_adapter.scale=.nan"], "backbone.ip_adapter.scale must be a finite number, got nan"),
    ({}, ["backbone.ip_adapter.weights=nowhere"], "backbone.ip_adapter.weights='nowhere' is neither a folder"),
    ({}, ["backbone.ip_adapter.weights=h94/IP-Adapter"], "h94/IP-Adapter is a Hub id: name its file by"),
    ({}, ["backbone.ip_adapter.weights=a.bin"], "backbone.ip_adapter.weights=a.bin is a pickle"),
    ({}, ["backbone.ip_adapter.weight_name=ip.bin"], "weight_name=ip.bin must be a .safetensors file"),
    ({}, ["backbone.ip_adapter.weight_name=b.safetensors"], "models/b.safetensors does not exist"),
    ({}, ["backbone.ip_adapter.subfolder=sdxl_models"], "sdxl_models contains 0 .safetensors files"),
    ({}, ["backbone.ip_adapter.image_encoder=encoder"], "models/encoder/config.json does not exist"),
    ({}, ["method.sync={weight: 20, network: random}"], "method.sync is not supported with an IP-Adapter"),
    ({}, ["backbone.name=flux"], "backbone.ip_adapter is not supported for backbone.name=flux; use sd or sdxl"),
]


@pytest.mark.parametrize(("row", "overrides", "message"), REFUSED, ids=lambda value: str(value)[-50:])
def test_impossible_settings_and_pictures_are_refused_by_name(refused, style_job, tmp_path, row, overrides, message):
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[1] |= row
    write_prompts(tmp_path, lines)
    for command in ("plan", "generate"):
        assert message in refused(command, style_job, *overrides)


def test_fingerprint_depends_on_contents_and_scale_only(style_job, tmp_path, monkeypatch, adapter):
    monkeypatch.chdir(tmp_path)

    def built(*overrides):
        job = load_job(style_job, [f"backbone.ip_adapter.{each}" for each in overrides])
        return manifest.build(job, build_plan(job), "float32").fingerprint

    first = built()
    shutil.copytree(adapter, tmp_path / "copy")
    (tmp_path / "copy/models/adapter.safetensors").rename(tmp_path / "copy/models/renamed.safetensors")
    assert built("weights=copy") == first
    assert built("weights=copy/models/renamed.safetensors", "subfolder=''") == first
    changed = {first, built("scale=0.5")}
    noise_picture(7).save(tmp_path / "style0.png")
    changed.add(built())
    shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((tmp_path / "other/models/image_encoder/config.json").read_text(encoding="utf-8"))
    (tmp_path / "other/models/image_encoder/config.json").write_text(
        json.dumps({**config, "hidden_act": "gelu"}), encoding="utf-8"
    )
    changed.add(built("weights=other"))
    assert len(changed) == 4


def test_without_an_ip_adapter_nothing_is_recorded(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load_job(job_file)
    assert "ip_adapter" not in manifest.build(job, build_plan(job), "float32").identity["backbone"]
    assert "ip_adapter" not in licences(job.backbone)


def test_pictures_are_needed_with_an_ip_adapter_and_refused_without(tiny, adapter):
    sampler = sampler_of(tiny, adapter)
    with pytest.raises(UserError, match="the backbone has an IP-Adapter: pass style="):
        sample(sampler, None)
    with pytest.raises(UserError, match="style must be a list of one picture for each of 1 panorama, got 0"):
        sample(sampler, [])
    plain = PanoramaSampler.from_pretrained(str(tiny), mad_steps=1, dtype="float32")
    with pytest.raises(UserError, match="style has no effect: the backbone has no IP-Adapter"):
        sample(plain, [noise_picture()])
    with pytest.raises(UserError, match=r"backbone\.ip_adapter\.scale=0\.5 has no effect; set backbone\.ip_adapter"):
        PanoramaSampler.from_pretrained(str(tiny), overrides=["backbone.ip_adapter.scale=0.5"])


def test_adapters_for_other_models_are_refused(tiny_xl, adapter):
    with pytest.raises(UserError, match=r"cannot load backbone\.ip_adapter\.weights="):
        PanoramaSampler.from_pretrained(
            str(tiny_xl), name="sdxl", overrides=[f"backbone.ip_adapter={{weights: {adapter}, subfolder: models}}"]
        )
