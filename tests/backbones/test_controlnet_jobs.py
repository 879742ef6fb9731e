"""ControlNets in jobs: weights, control pictures of prompt lines, refusals, cost, records and reproduction."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from picture_jobs import noise_picture, samples_of, write_picture_job, write_prompts
from PIL import Image

from madgen import PanoramaSampler, UserError, load_job
from madgen.dataset import manifest
from madgen.dataset.plan import build_plan
from madgen.hub.adapters import controlnet_id
from madgen.hub.license import check_licences
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun


@pytest.fixture(scope="session")
def network(tiny):
    """Return a ControlNet of random weights for the tiny backbone."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(tiny, subfolder="unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8))
    for layer in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.3)
    embedding = network.controlnet_cond_embedding
    for layer in [embedding.conv_in, *embedding.blocks, embedding.conv_out]:
        torch.nn.init.kaiming_normal_(layer.weight)
    return network


@pytest.fixture(scope="session")
def weights(network, tmp_path_factory):
    """Return the folder of the ControlNet."""
    folder = tmp_path_factory.mktemp("control") / "edges"
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def control_job(job_file, weights):
    """Write a job of 3 prompts with control pictures, 2 samples each."""
    return write_picture_job(job_file, "control", f"controlnet: {{weights: {weights}}}")


def sampler_of(tiny, weights, *overrides, **options):
    overrides = [f"backbone.controlnet.weights={weights}", *overrides]
    return PanoramaSampler.from_pretrained(
        str(tiny), **{"mad_steps": 1, "dtype": "float32", "overrides": overrides, **options}
    )


def sample(sampler, control, **options):
    size = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output": "latent"}
    return sampler.sample(["a hill"], seeds=[1], control=control, **{**size, **options})


def test_dataset_follows_the_pictures_and_regenerates_its_samples(madgen_here, control_job, tmp_path, tiny, weights):
    assert madgen_here("generate", control_job).code == 0
    samples = samples_of(tmp_path / "out")
    assert len(samples) == 6
    assert madgen_here("preview", "out").code == 0
    page = (tmp_path / "out/preview.html").read_text(encoding="utf-8")
    assert len(re.findall(r'"caption": ?"Control picture", ?"picture": ?"data:image/webp', page)) == 6
    assert Image.open(tmp_path / "out/preview.png").width >= 2 * 64  # beside their panoramas
    record, image = samples["1", 1]
    assert record["backbone"]["controlnet"] == {
        "id": controlnet_id(str(weights)),
        "scale": 1.0,
        "start": 0.0,
        "end": 1.0,
    }
    assert str(tmp_path) not in json.dumps(record)
    direct = sampler_of(tiny, weights).sample(
        [record["prompt"]], seeds=[record["seed"]], control=[noise_picture(1)], height=32, width=64,
        num_inference_steps=2, guidance_scale=2.0,
    )  # fmt: skip
    assert np.abs(direct[0].astype(int) - image).max() <= 1
    again = madgen_here("regenerate", "out", record["key"], "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    (tmp_path / "control1.png").rename(tmp_path / "elsewhere.png")
    lost = madgen_here("regenerate", "out", record["key"], "-o", "again.png")
    assert (lost.code, "pass --control FILE" in lost.err) == (2, True)
    again = madgen_here("regenerate", "out", record["key"], "-o", "again.png", "--control", "elsewhere.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    assert madgen_here("verify", "out").code == 0
    single = madgen_here(
        "sample", record["prompt"], "--job", control_job, "--control", "elsewhere.png", "--seed", record["seed"], "-o",
        "single.png",
    )  # fmt: skip
    assert single.code == 0, single.err
    assert np.abs(np.array(Image.open(tmp_path / "single.png")).astype(int) - direct[0].astype(int)).max() <= 1
    missing = madgen_here("sample", "hills", "--job", control_job, "-o", "none.png")
    assert (missing.code, "backbone.controlnet follows a picture: name it with --control" in missing.err) == (2, True)


@pytest.mark.slow
def test_workers_and_resumed_runs_write_the_same_bytes(madgen, control_job, tmp_path):
    for devices in (1, 2):
        result = madgen("generate", control_job, f"trainer.devices={devices}", f"output.dir=out{devices}")
        assert result.code == 0, result.err
    one, two = (sorted((tmp_path / f"out{devices}/shards").glob("*.tar")) for devices in (1, 2))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    one[1].unlink()
    one[1].with_suffix(".json").unlink()
    assert madgen("generate", control_job, "output.dir=out1").code == 0
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


REFUSED = [
    ({"control": None}, [], "prompts.jsonl:2: no control picture; a ControlNet follows a picture of each row"),
    ({"control": "none.png"}, [], "prompts.jsonl:2: control file none.png does not exist"),
    (
        {"control": "/etc/hostname"},
        [],
        "prompts.jsonl:2: control file /etc/hostname is outside the folder of the prompt",
    ),
    ({"control": "prompts.jsonl"}, [], "prompts.jsonl:2: cannot read the control"),
    (
        {},
        ["backbone.controlnet={weights: null}"],
        "prompts.jsonl:1: the field 'control' has no effect without backbone",
    ),
    ({}, ["backbone.controlnet.start=1"], "need 0 <= start < end <= 1 of the steps, got start=1"),
    ({}, ["backbone.controlnet.end=.nan"], "need 0 <= start < end <= 1 of the steps, got start=0.0, end=nan"),
    ({}, ["backbone.controlnet.scale=.inf"], "backbone.controlnet.scale must be a finite number, got inf"),
    ({}, ["backbone.controlnet={start: 0.3, end: 0.4}"], "start=0.3 and end=0.4 include none of 2 steps"),
    ({}, ["backbone.controlnet.weights=nowhere"], "backbone.controlnet.weights='nowhere' is neither a folder"),
    ({}, ["backbone.controlnet.weights=a.safetensors"], "backbone.controlnet.weights=a.safetensors does not exist"),
    ({}, ["backbone.controlnet.weights=a.pth"], "backbone.controlnet.weights=a.pth is a pickle"),
    ({}, ["method.sync={weight: 20, network: random}"], "method.sync is not supported with a ControlNet"),
    (
        {},
        ["method.merge={operator: swap, reference_steps: 1}", "method.mad.steps=0"],
        "method.merge.reference_steps=1 denoises a view outside of the panorama",
    ),
    ({}, ["backbone.name=flux"], "backbone.controlnet is not supported for backbone.name=flux; use sd or sdxl"),
    ({}, ["backbone.name=sd3"], "backbone.controlnet is not supported for backbone.name=sd3; use sd or sdxl"),
]


@pytest.mark.parametrize(("row", "overrides", "message"), REFUSED, ids=lambda value: str(value)[-50:])
def test_impossible_settings_and_pictures_are_refused_by_name(refused, control_job, tmp_path, row, overrides, message):
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[1] |= row
    write_prompts(tmp_path, lines)
    for command in ("plan", "generate"):
        assert message in refused(command, control_job, *overrides)


def test_strength_without_weights_is_refused(madgen_here, job_file, tiny):
    result = madgen_here("plan", job_file, "backbone.controlnet.scale=0.5")
    assert (result.code, result.out) == (2, "")
    assert "backbone.controlnet.scale=0.5 has no effect; set backbone.controlnet.weights" in result.err
    with pytest.raises(UserError, match=r"backbone\.controlnet\.end=0\.5 has no effect"):
        PanoramaSampler.from_pretrained(str(tiny), overrides=["backbone.controlnet.end=0.5"])


def test_fingerprint_depends_on_contents_and_strength_only(control_job, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)

    def built(*overrides):
        job = load_job(control_job, overrides)
        return manifest.build(job, build_plan(job), "float32").fingerprint

    first = built()
    for name in ("copy", "other"):
        shutil.copytree(weights, tmp_path / name)
    assert built("backbone.controlnet.weights=copy") == first
    changed = {built("backbone.controlnet.scale=0.5"), built("backbone.controlnet.end=0.5"), first}
    noise_picture(7).save(tmp_path / "control0.png")
    changed.add(built())
    config = json.loads((tmp_path / "other/config.json").read_text(encoding="utf-8"))
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "act_fn": "gelu"}), encoding="utf-8")
    changed.add(built("backbone.controlnet.weights=other"))
    assert len(changed) == 5


def test_plan_counts_the_evaluations_with_the_controlnet(
    madgen_here, control_job, tmp_path, monkeypatch, tiny, weights
):
    monkeypatch.chdir(tmp_path)

    def planned(*overrides):
        run = ResolvedRun.of(load_job(control_job, ["sampling.num_inference_steps=4", *overrides]))
        return forecast(run).cost.view_evaluations, forecast(run).controlled

    def evaluated(*overrides):
        sampler, counts = sampler_of(tiny, weights, *overrides), {"unet": 0, "control": 0}
        for name, network in (("unet", sampler.backbone.unet), ("control", sampler.backbone.controlnet)):
            network.register_forward_pre_hook(
                lambda _, inputs, name=name: counts.update({name: counts[name] + len(inputs[0])})
            )
        sample(sampler, [noise_picture()], num_inference_steps=4)
        return 6 * counts["unet"], 6 * counts["control"]

    half = "backbone.controlnet.end=0.5"
    assert planned() == evaluated()
    assert planned(half) == evaluated(half)
    assert planned(half)[1] * 2 == planned(half)[0]
    command = "plan", control_job, half, "sampling.num_inference_steps=4"
    assert "240 view evaluations (120 with the ControlNet)" in madgen_here(*command).out
    assert json.loads(madgen_here(*command, "--json").out)["controlled_view_evaluations"] == 120


def test_panorama_without_a_picture_is_refused_and_so_is_a_picture_without_controlnet(tiny, weights):
    sampler = sampler_of(tiny, weights)
    with pytest.raises(UserError, match="the backbone has a ControlNet: pass control="):
        sample(sampler, None)
    with pytest.raises(UserError, match="control must be a list of one picture for each of 1 panorama, got 2"):
        sample(sampler, [noise_picture(), noise_picture()])
    with pytest.raises(UserError, match=r"uint8 arrays \[H, W, 3\] or paths of files, got an item float64 \[2, 2, 3\]"):
        sample(sampler, [np.zeros((2, 2, 3))])
    plain = PanoramaSampler.from_pretrained(str(tiny), mad_steps=1, dtype="float32")
    with pytest.raises(UserError, match="control has no effect: the backbone has no ControlNet"):
        sample(plain, [noise_picture()])


def test_without_a_controlnet_nothing_changes(tiny, weights, job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load_job(job_file)
    built = manifest.build(job, build_plan(job), "float32")
    assert "controlnet" not in built.identity["backbone"]
    assert "controlnet" not in built.licence
    plain = PanoramaSampler.from_pretrained(str(tiny), mad_steps=1, dtype="float32")
    silent = sampler_of(tiny, weights, "backbone.controlnet.scale=0")
    assert torch.equal(sample(silent, [noise_picture()]), sample(plain, None))


def test_single_files_in_both_layouts_equal_their_folder(tiny, weights, network, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(weights / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "edges.safetensors")
    expected = sample(sampler_of(tiny, weights), [noise_picture()])
    assert torch.equal(sample(sampler_of(tiny, tmp_path / "edges.safetensors"), [noise_picture()]), expected)
    del state["controlnet_mid_block.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(
        UserError, match=r"cannot load backbone\.controlnet\.weights=.*short\.safetensors: .*Missing key"
    ):
        sampler_of(tiny, tmp_path / "short.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "edges.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        controlnet_id(str(tmp_path / "cut.safetensors"))


def test_networks_for_other_models_are_refused(tiny, tiny_xl, weights, network, tmp_path):
    from diffusers import ControlNetModel

    with pytest.raises(UserError, match="for another model: its cross_attention_dim is 96, the backbone's 64"):
        sampler_of(tiny_xl, weights, name="sdxl")
    config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    ControlNetModel.from_config({**config, "conditioning_embedding_out_channels": (4, 8)}).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(UserError, match="it takes 2 pixels per latent cell, the backbone 4"):
        sampler_of(tiny, tmp_path / "a")
    ControlNetModel.from_config({**config, "global_pool_conditions": True}).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"needs guess mode \(global_pool_conditions\), which is not supported"):
        sampler_of(tiny, tmp_path / "b")


def test_licence_of_the_controlnet_counts(control_job, tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text(
        "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n", encoding="utf-8"
    )
    job = load_job(control_job, ["backbone.controlnet.weights=copy"])
    with pytest.raises(UserError, match="the licence of copy, flux-1-dev-non-commercial-license, restricts"):
        check_licences(job.backbone)
    content = manifest.build(job, build_plan(job), "float32")
    assert content.licence["controlnet"]["name"] == "flux-1-dev-non-commercial-license"


def test_pipelines_with_what_is_not_supported_are_refused(tiny, network):
    from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(tiny)
    pipe = StableDiffusionControlNetPipeline(**{**plain.components, "controlnet": MultiControlNetModel([network] * 2)})
    with pytest.raises(UserError, match="pipe: MultiControlNetModel is not supported; use a single ControlNetModel"):
        PanoramaSampler.from_pipe(pipe)
    with pytest.raises(UserError, match=r"backbone\.controlnet has no effect: the pipeline has no ControlNet"):
        PanoramaSampler.from_pipe(plain, overrides=["backbone.controlnet.scale=0.5"])
    with pytest.raises(UserError, match=r"backbone\.controlnet\.weights cannot be set here"):
        PanoramaSampler.from_pipe(plain, overrides=["backbone.controlnet.weights=x"])
