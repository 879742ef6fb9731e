"""GPU memory of a plan: weights equal those of loaded modules, activations are near the measured peak."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_transformers import FAMILIES, folder_of

from madgen import PanoramaSampler, UserError
from madgen.backbones import backbone_module
from madgen.config.schema import BackboneConfig
from madgen.diffusion.attention import JointStep
from madgen.diffusion.merge import split
from madgen.diffusion.views import build_layout
from madgen.hub.repository import without_retries
from madgen.hub.weights import ModelFiles
from madgen.planning.gpu_memory import GIB, GpuMemory, Work, check_weights

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"
UNETS = ["sd", "sdxl"]
EMBEDDINGS = 2**14  # bytes of what does not grow with the views, such as embeddings of the timestep
SIDE, VIEW = 24, 16  # latent cells of a canvas of four views


@pytest.fixture(scope="module")
def folders(tiny, tiny_xl):
    return lambda name: {"sd": tiny, "sdxl": tiny_xl}.get(name) or folder_of(name)


def size_of(name, folder, length=None):
    with without_retries():
        return backbone_module(name).size(ModelFiles(str(folder)), length)


def load(name, folder, dtype):
    return PanoramaSampler.from_pretrained(str(folder), name=name, dtype=dtype, view_size=VIEW, stride=8, mad_steps=1)


def held(model):
    """Return the bytes of parameters and persistent buffers of floating point."""
    tensors = [*model.parameters(), *(value for name, value in model.named_buffers() if name in model.state_dict())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*FAMILIES, *UNETS])
def test_weights_are_exactly_those_of_the_loaded_models(folders, name, dtype):
    backbone = load(name, folders(name), dtype).backbone
    memory = GpuMemory(size_of(name, folders(name)), Work(0, 0, 0), Work(0, 0, 0), dtype, "none", None)
    assert memory.network == held(backbone.network)
    assert memory.vae == held(backbone.vae)
    assert memory.text_encoders == sum(map(held, backbone.text_encoders))


def peak(function):
    """Return the largest number of bytes that PyTorch holds at a time beyond those before the call."""
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("name", [*FAMILIES, *UNETS])
def test_activations_are_within_a_factor_of_two_of_the_measured_peak(folders, name):
    sampler = load(name, folders(name), "bfloat16")
    backbone, size = sampler.backbone, size_of(name, folders(name))
    views = build_layout("overlapping", SIDE, SIDE, VIEW, 8, False).at(0)
    prompts = backbone.encode_prompts(["mountains over the sea"], [""], 3.0)
    size = replace(size, text_tokens=prompts.embeddings_NTD.shape[1])
    memory = GpuMemory(size, Work(0, 0, 0), Work(0, 0, 0), "bfloat16", "none", None)
    canvas, time = torch.randn(1, backbone.spec.channels, SIDE, SIDE), torch.tensor(500.0)
    split_views, paths = split(canvas, views), prompts.paths
    joint = JointStep(views=views, step=0, merging=sampler.method.merging)
    later = replace(joint, step=1)
    apart = Work(paths * views.count * VIEW**2, paths * views.count, 0)
    merged = Work(paths * SIDE**2, paths, 0) if name in FAMILIES else apart
    pixels = Work(0, 0, (SIDE * backbone.spec.factor) ** 2)
    calls = {
        "views": (apart, lambda: backbone.predict_noise(split_views, time, prompts, later)),
        "merged": (merged, lambda: backbone.predict_noise(split_views, time, prompts, joint)),
        "one view": (Work(VIEW**2, 1, 0), lambda: backbone.predict_noise(split_views[:, :1], time, prompts, later, 1)),
        "decoded": (pixels, lambda: backbone.decode(canvas)),
    }
    if name in FAMILIES:
        general = replace(joint, merging=replace(joint.merging, positions="local"))
        calls["general"] = (apart, lambda: backbone.predict_noise(split_views, time, prompts, general))
    sizes = {label: (peak(call), max(memory.activations(work))) for label, (work, call) in calls.items()}
    assert all(0.5 * stated <= actual <= 2 * stated + EMBEDDINGS for actual, stated in sizes.values()), sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "cls"),
    [
        ("flux", "black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel"),
        ("z_image", "Tongyi-MAI/Z-Image-Turbo", "ZImageTransformer2DModel"),
        ("qwen_image", "Qwen/Qwen-Image", "QwenImageTransformer2DModel"),
    ],
)
def test_sizes_of_published_models_are_those_of_diffusers(name, model, cls):
    import diffusers

    options = {"guidance_embeds": True} if name == "flux" else {}
    with torch.device("meta"):
        network = getattr(diffusers, cls)(**options)
    size = size_of(name, model)
    linear = [module.weight for module in network.modules() if isinstance(module, torch.nn.Linear)]
    assert size.network.total == sum(parameter.numel() for parameter in network.parameters())
    assert size.network.linear == sum(weight.numel() for weight in linear)
    assert size.network.rows == sum(len(weight) for weight in linear)


def test_int8_weights_take_the_bytes_of_torchao():
    pytest.importorskip("torchao.quantization", reason="needs the extra quant")
    folder = folder_of("qwen_image")
    overrides = ["backbone.quantization=int8"]
    network = PanoramaSampler.from_pretrained(
        str(folder), name="qwen_image", dtype="bfloat16", overrides=overrides
    ).backbone.network

    def stored(tensor):
        inner = [getattr(tensor, name, None) for name in ("qdata", "scale", "zero_point")]
        parts = [part for part in inner if part is not None] or [tensor]
        return sum(part.numel() * part.element_size() for part in parts)

    memory = GpuMemory(size_of("qwen_image", folder), Work(0, 0, 0), Work(0, 0, 0), "bfloat16", "none", "int8")
    assert memory.network == sum(stored(parameter) for parameter in network.parameters())


def memory_of(offload="none", quantization=None):
    size = size_of("flux", "black-forest-labs/FLUX.1-dev")
    return GpuMemory(size, Work(4 * 64**2, 4, 2**22), Work(64**2, 1, 2**20), "bfloat16", offload, quantization)


def test_offloading_and_quantization_lower_the_peak():
    peaks = [memory_of(offload).required for offload in ("none", "text_encoders", "model")]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[1] > 23.8e9  # 11.9e9 weights of 2 bytes
    assert [memory_of(quantization=kind).network for kind in ("int8", "nf4")] == pytest.approx(
        [11.9e9, 0.5625 * 11.9e9], rel=0.01
    )


def plan(madgen_here, tmp_path, *overrides):
    (tmp_path / "prompts.txt").write_text("the sea\n")
    job = [CONFIGS / "flux-schnell.yaml", "prompts.source=prompts.txt", "output.dir=out", *overrides]
    return madgen_here("plan", *job)


def test_plan_states_the_memory_of_a_model_that_is_not_here(madgen_here, tmp_path):
    result = plan(madgen_here, tmp_path)
    assert "GPU memory: about" in result.out
    assert "network 22.2 GiB, text encoders 9.1 GiB, VAE 160 MiB" in result.out


@pytest.mark.parametrize(
    ("memory", "fix"),
    [(36, "set backbone.offload=text_encoders"), (20, "backbone.quantization=int8"), (2, "use a GPU with more memory")],
)
def test_a_job_that_cannot_fit_is_refused_with_a_fix_that_fits(madgen_here, tmp_path, memory, fix):
    refused = plan(madgen_here, tmp_path, f"backbone.gpu_memory={memory}")
    assert (refused.code, refused.out) == (2, "")
    assert f"backbone.gpu_memory={memory} GiB is too little: at least" in refused.err
    assert fix in refused.err
    assert not (tmp_path / "out").exists()
    settings = [word for word in refused.err.split() if word.startswith("backbone.") and "gpu_memory" not in word]
    if settings and not any("quantization" in setting for setting in settings):  # may need a package
        assert plan(madgen_here, tmp_path, f"backbone.gpu_memory={memory}", *settings).code == 0


def test_offloading_is_a_fix_for_unets_too(madgen_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("the sea\n", encoding="utf-8")
    job = [CONFIGS / "sd2.yaml", "prompts.source=prompts.txt", "output.dir=out"]
    refused = madgen_here("plan", *job, "backbone.gpu_memory=4.3")
    assert "set backbone.offload=text_encoders" in refused.err
    assert "quantization" not in madgen_here("plan", *job, "backbone.gpu_memory=1").err
    assert madgen_here("plan", *job, "backbone.gpu_memory=4.3", "backbone.offload=text_encoders").code == 0


def test_generate_refuses_what_plan_refuses(madgen_here, job_file):
    overrides = ["backbone.gpu_memory=0.00001", "trainer.accelerator=auto"]
    planned, generated = (madgen_here(command, job_file, *overrides) for command in ("plan", "generate"))
    assert (planned.code, planned.err) == (generated.code, generated.err)
    assert planned.code == 2


@pytest.mark.parametrize("value", [0, -1, "many", ".inf"])
def test_bad_values_are_refused(madgen_here, job_file, value):
    result = madgen_here("plan", job_file, f"backbone.gpu_memory={value}")
    assert result.code == 2
    assert "backbone.gpu_memory" in result.err


def test_plan_says_that_gradients_are_not_estimated(madgen_here, tmp_path):
    note = "not estimated: the gradients of SyncDiffusion"
    assert note not in plan(madgen_here, tmp_path).out
    assert note in plan(madgen_here, tmp_path, "method.sync.weight=20", "method.sync.network=random").out


def test_json_has_bytes_that_add_up(madgen_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("the sea\n")
    job = [CONFIGS / "qwen-image.yaml", f"backbone.pretrained={folder_of('qwen_image')}", "prompts.source=prompts.txt"]
    size = ["method.views.size=16", "method.views.stride=4", "sampling.height=32", "sampling.width=64"]
    result = madgen_here("plan", *job, *size, "output.dir=out", "--json")
    memory = json.loads(result.out)["gpu_memory"]
    assert memory["peak"] == memory["network"] + memory["vae"] + memory["text_encoders"] + memory["activations"]
    assert memory["peak_at_least"] <= memory["peak"] < GIB


def test_a_job_on_the_cpu_has_no_gpu_memory(madgen_here, tmp_path):
    assert "GPU memory" not in plan(madgen_here, tmp_path, "trainer.accelerator=cpu").out


def test_a_small_model_has_no_line_on_gpu_memory(madgen_here, job_file):
    overrides = ["trainer.accelerator=auto", "output.dir=out"]
    assert json.loads(madgen_here("plan", job_file, *overrides, "--json").out)["gpu_memory"]["peak"] < GIB
    assert "GPU memory" not in madgen_here("plan", job_file, *overrides).out


def test_models_that_exceed_the_gpu_are_refused_before_they_are_loaded():
    backbone = BackboneConfig(name="flux", pretrained="black-forest-labs/FLUX.1-schnell")
    check_weights(backbone, "NVIDIA A100", 40 * GIB)
    with pytest.raises(UserError, match=r"RTX 4090 with 24\.0 GiB is too little: at least 31\.\d GiB") as refused:
        check_weights(backbone, "RTX 4090", 24 * GIB)
    assert "set backbone.offload=model (22.2 GiB)" in str(refused.value)
