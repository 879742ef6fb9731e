"""v-prediction: marks of single files, and `backbone.prediction_type`, against diffusers pipelines set up by hand."""

import json

import pytest
import torch
from ldm_layout import save_single_file
from safetensors.torch import load_file, save_file

from madgen import PanoramaSampler, UserError
from madgen.backbones._schedulers import own_scheduler, scheduler_class
from madgen.hub.weights import ModelFiles

SIZE = {"height": 32, "width": 64, "guidance_scale": 3.0, "num_inference_steps": 4}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
MARKS = [
    ({"v_pred": torch.tensor([])}, {}, V),
    ({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, {}, ZERO_SNR),
    ({}, {"modelspec.prediction_type": "v"}, V),
    ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, V),
    ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ZERO_SNR),
]


@pytest.fixture(scope="module")
def single(tiny, tiny_xl, tmp_path_factory):
    """Return the tensors of the tiny pipelines in the layout of single files, and their folders."""
    from diffusers import DiffusionPipeline

    out = tmp_path_factory.mktemp("single")
    folders = {"sd": tiny, "sdxl": tiny_xl}
    return {
        name: (
            load_file(save_single_file(DiffusionPipeline.from_pretrained(folder), out / f"{name}.safetensors")),
            folder,
        )
        for name, folder in folders.items()
    }


def marked(single, name, tmp_path, tensors=(), metadata=None):
    file = tmp_path / f"{name}.safetensors"
    save_file({**single[name][0], **dict(tensors)}, file, metadata=metadata or None)
    return file


def sample(pretrained, **options):
    sampler = PanoramaSampler.from_pretrained(str(pretrained), layout="whole", mad_steps=0, dtype="float32", **options)
    return sampler.sample(["a hill"], seeds=[2], output="latent", **SIZE)


def by_hand(folder, keys):
    """Sample with a diffusers pipeline whose scheduler has these keys."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = type(pipeline.scheduler).from_config({**own_scheduler(ModelFiles(str(folder))), **keys})
    generator = torch.Generator().manual_seed(2)
    return pipeline("a hill", generator=generator, output_type="latent", **SIZE).images


def assert_equal(latents, expected):
    assert float((latents - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(("tensors", "metadata", "keys"), MARKS)
def test_marks_contradict_the_config_until_prediction_type_is_set(name, tensors, metadata, keys, single, tmp_path):
    file, folder = marked(single, name, tmp_path, tensors, metadata), single[name][1]
    with pytest.raises(UserError, match=r"is marked otherwise .*set backbone.prediction_type=v_prediction"):
        own_scheduler(ModelFiles(str(file), None, str(folder)))
    assert (
        own_scheduler(ModelFiles(str(file), None, str(folder)), "v_prediction")
        == own_scheduler(ModelFiles(str(folder))) | keys
    )
    own = own_scheduler(ModelFiles(str(file), None, str(folder)), "epsilon")
    assert own == own_scheduler(ModelFiles(str(folder))) | {"prediction_type": "epsilon"}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_marked_file_is_the_pipeline_set_up_by_hand(name, single, tmp_path):
    file, folder = marked(single, name, tmp_path, MARKS[1][0]), single[name][1]
    latents = sample(file, name=name, config=str(folder), prediction_type="v_prediction")
    assert_equal(latents, by_hand(folder, ZERO_SNR))
    assert not torch.allclose(latents, by_hand(folder, V), rtol=1e-2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_replaces_that_of_the_config(kind, tiny):
    assert_equal(sample(tiny, prediction_type=kind), by_hand(tiny, {"prediction_type": kind}))


def test_marks_are_followed_where_the_config_says_nothing_else(single, tmp_path, monkeypatch):
    """That is so where the config is inferred from the shapes, or lacks the key."""
    file, folder = marked(single, "sd", tmp_path, MARKS[1][0]), single["sd"][1]
    monkeypatch.setattr("madgen.hub.model_configs._inferred", lambda _: str(folder))
    assert own_scheduler(ModelFiles(str(file))) == own_scheduler(ModelFiles(str(folder))) | ZERO_SNR
    from madgen.hub.prediction_marks import scheduler_of_file

    own = {"_class_name": "PNDMScheduler", "steps_offset": 1}
    assert scheduler_of_file(marked(single, "sd", tmp_path, MARKS[0][0]), own, str(folder), None) == own | V


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"v_pred": torch.zeros(1)}, {"modelspec.prediction_type": "epsilon"}, "contradicts itself: tensor v_pred"),
        ({"edm_vpred.sigma_max": torch.zeros(1)}, {}, "is an EDM model .tensor edm_vpred.sigma_max"),
        ({"ztsnr": torch.zeros(1)}, {}, "tensor ztsnr: zero terminal SNR"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(tensors, metadata, message, single, tmp_path):
    file = marked(single, "sd", tmp_path, tensors, metadata)
    with pytest.raises(UserError, match=message):
        own_scheduler(ModelFiles(str(file), None, str(single["sd"][1])))


def test_schedulers_that_ignore_zero_snr_are_refused(single, tmp_path):
    file, folder = marked(single, "sd", tmp_path, MARKS[1][0]), single["sd"][1]
    with pytest.raises(UserError, match="PNDMScheduler does not support rescale_betas_zero_snr=True"):
        PanoramaSampler.from_pretrained(
            str(file), config=str(folder), prediction_type="v_prediction", scheduler="PNDMScheduler"
        ).new_scheduler(4)
    assert (
        scheduler_class("DDIMScheduler").from_config(own_scheduler(ModelFiles(str(folder)))).config.prediction_type
        == "epsilon"
    )


@pytest.mark.slow
def test_prediction_type_is_part_of_the_identity_and_of_samples(madgen, job_file, tmp_path):
    done = madgen("generate", job_file, "backbone.prediction_type=v_prediction", "prompts.limit=1")
    assert done.code == 0, done.err
    identity = json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))["identity"]
    assert identity["backbone"]["prediction_type"] == "v_prediction"
    assert madgen("generate", job_file, "prompts.limit=1").code == 2
    key = json.loads(next((tmp_path / "out/shards").glob("*.json")).read_text(encoding="utf-8"))["samples"][0]["key"]
    assert "the same pixels" in madgen("regenerate", "out", key, "-o", "again.png").out
