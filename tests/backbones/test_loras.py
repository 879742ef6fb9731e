"""LoRAs are fused like in diffusers and are part of the identity of a sample."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from madgen import PanoramaSampler, UserError
from madgen.config.loader import load_job

SIZE = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}


def save_lora(path, layers, seed=0):
    """A LoRA of rank 2 for layers such as `unet.conv_in`: {name: (inputs, outputs)}."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    save_file(tensors, path)
    return path


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn"
UNET = {f"unet.{ATTENTION}1.to_q": (16, 16), f"unet.{ATTENTION}2.to_out.0": (16, 16)}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
LAYERS = {
    "sd": {**UNET, f"text_encoder.{TEXT}": (96, 96)},
    "sdxl": {**UNET, f"text_encoder.{TEXT}": (24, 24), f"text_encoder_2.{TEXT}": (40, 40)},
}


@pytest.fixture(scope="session")
def folders(tiny, tiny_xl):
    return {"sd": tiny, "sdxl": tiny_xl}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_two_loras_equal_the_diffusers_pipeline(folders, tmp_path, name):
    from diffusers import DiffusionPipeline

    files = [save_lora(tmp_path / f"{seed}.safetensors", LAYERS[name], seed) for seed in (0, 1)]
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    for index, file in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{index}")
    pipeline.set_adapters(["a0", "a1"], [0.3, -0.2])
    generator = torch.Generator().manual_seed(5)
    reference = pipeline("a hill", negative_prompt="fog", output_type="latent", generator=generator, **SIZE).images

    def latents(*scales):
        loras = [{"weights": str(file), "scale": scale} for file, scale in zip(files, scales, strict=False)]
        sampler = PanoramaSampler.from_pretrained(
            str(folders[name]), name=name, layout="whole", mad_steps=0, loras=loras
        )
        return sampler.sample(["a hill"], negative_prompts=["fog"], seeds=[5], output="latent", **SIZE)

    assert float((latents(0.3, -0.2) - reference).norm() / reference.norm()) <= 1e-4
    assert float((latents(0.3) - reference).norm() / reference.norm()) > 1e-3
    assert torch.allclose(latents(0.0), latents(), atol=1e-5)


def test_fused_loras_leave_plain_attention_that_mad_merges(tiny, tmp_path):
    file = save_lora(tmp_path / "a.safetensors", LAYERS["sd"])
    plain = PanoramaSampler.from_pretrained(str(tiny))
    fused = PanoramaSampler.from_pretrained(str(tiny), loras=[{"weights": str(file)}])
    layers = [name for name, _ in plain.backbone.unet.named_modules() if name.endswith(("attn1", "attn2"))]
    assert layers
    for name in layers:
        assert type(fused.backbone.unet.get_submodule(name)) is type(plain.backbone.unet.get_submodule(name))
        assert type(fused.backbone.unet.get_submodule(name).to_q) is torch.nn.Linear
    assert set(fused.backbone.unet.state_dict()) == set(plain.backbone.unet.state_dict())
    assert set(fused.backbone.text_encoders[0].state_dict()) == set(plain.backbone.text_encoders[0].state_dict())


def test_loras_of_other_trainers_and_folders_are_applied(tiny, tmp_path):
    """The names that kohya's scripts give, with an alpha; a folder that holds one file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(save_lora(tmp_path / "peft.safetensors", UNET))
    folder = tmp_path / "kohya"
    folder.mkdir()
    other = {}
    for key, value in tensors.items():
        layer, _, end = key.removeprefix("unet.").partition(".lora_")
        flat = "lora_unet_" + layer.replace(".", "_")
        other[f"{flat}.{'lora_down' if end[0] == 'A' else 'lora_up'}.weight"] = value
        other[f"{flat}.alpha"] = torch.tensor(1.0)  # of rank 2: half the strength
    save_file(other, folder / "style.safetensors")
    given = [{"weights": str(folder)}, {"weights": str(tmp_path / "peft.safetensors"), "scale": 0.5}]
    weights = [PanoramaSampler.from_pretrained(str(tiny), loras=[lora]).backbone.unet.state_dict() for lora in given]
    changed = f"{ATTENTION}1.to_q.weight"
    torch.testing.assert_close(weights[0][changed], weights[1][changed])
    assert not torch.equal(
        weights[0][changed], PanoramaSampler.from_pretrained(str(tiny)).backbone.unet.state_dict()[changed]
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"unet.nowhere.to_q": (16, 16)}, "its unet has no layer nowhere.to_q"),
        ({**UNET, "unet.nowhere.to_q": (16, 16)}, "its unet has no layer nowhere.to_q"),
        ({"transformer.blocks.0.to_q": (16, 16)}, "its transformer has no layer blocks.0.to_q"),
        (
            {f"unet.{ATTENTION}1.to_q": (32, 16)},
            "cannot apply the LoRA .*: it is for another model: unet.*to_q has 16 inputs here, and 32 in the LoRA",
        ),
        ({}, "it has no layers"),
    ],
)
def test_a_lora_that_cannot_be_applied_in_full_is_refused(tiny, tmp_path, layers, message):
    file = save_lora(tmp_path / "a.safetensors", layers)
    with pytest.raises(UserError, match=message) as raised:
        PanoramaSampler.from_pretrained(str(tiny), loras=[{"weights": str(file)}])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 16), None),
        ((32, 16), "has 16 inputs here, and 32 in the LoRA"),
        ((16, 8), "has 16 outputs here, and 8 in the"),
    ],
)
def test_plan_and_generate_refuse_sizes_of_another_model_in_one_line(
    madgen_here, job_file, tmp_path, shape, message, kohya
):
    name = f"unet.{ATTENTION}1.to_q"
    state = load_file(save_lora(tmp_path / "a.safetensors", {name: shape}))
    if kohya:
        flat = "lora_unet_" + name.partition(".")[2].replace(".", "_")
        roles = {"A": "down", "B": "up"}
        state = {f"{flat}.lora_{roles[role]}.weight": state[f"{name}.lora_{role}.weight"] for role in roles}
        save_file(state, tmp_path / "a.safetensors")
    word = "backbone.loras=[{weights: a.safetensors}]"
    for command in ("plan", "generate") if message else ("plan",):
        result = madgen_here(command, job_file, word)
        if message is None:
            assert (result.code, result.err) == (0, "")
        else:
            assert (result.code, len(result.err.splitlines()), message in result.err) == (2, 1, True), result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layer", "part"), [("unet.nowhere.to_q", "unet"), ("transformer.blocks.0.to_q", "transformer")]
)
def test_plan_refuses_a_lora_with_layers_of_another_model(madgen_here, job_file, tmp_path, layer, part):
    save_lora(tmp_path / "a.safetensors", {layer: (16, 16)})
    result = madgen_here("plan", job_file, "backbone.loras=[{weights: a.safetensors}]")
    assert (result.code, f"its {part} has no layer" in result.err) == (2, True), result.err


def test_a_missing_lora_is_named_once(tiny):
    with pytest.raises(UserError, match=r"^backbone\.loras: weights=gone\.safetensors does not exist$"):
        PanoramaSampler.from_pretrained(str(tiny), loras=[{"weights": "gone.safetensors"}])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"weights": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"weights": "a.bin"}, "is a pickle"),
        ({"weights": "nothing"}, "is neither a folder"),
        ({"weights": "a", "strength": 1.0}, "a LoRA is {weights"),
        ({"scale": 1.0}, "a LoRA is {weights"),
    ],
)
def test_files_that_are_not_loras_are_refused(tiny, lora, message):
    with pytest.raises(UserError, match=message):
        PanoramaSampler.from_pretrained(str(tiny), loras=[lora])


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("[{weights: a, strength: 2}]", "unknown key 'strength'"),
        ("[{scale: 2}]", r"loras\[0\].weights"),
        ("[{weights: '', scale: 1}]", "weights is empty"),
        ("[{weights: a, scale: .inf}]", "scale must be a finite number"),
        ("[a.safetensors]", "is a mapping"),
    ],
)
def test_a_job_s_loras_are_checked_when_it_is_loaded(loras, message):
    with pytest.raises(UserError, match=message):
        load_job([], [f"backbone.loras={loras}"])


def test_lora_changes_the_fingerprint_and_is_regenerated(madgen, job_file, tmp_path):
    file = save_lora(tmp_path / "style.safetensors", LAYERS["sd"])

    def lora(scale):
        return f"backbone.loras=[{{weights: style.safetensors, scale: {scale}}}]"

    done = madgen("generate", job_file, lora(0.5), "prompts.limit=1")
    assert done.code == 0, done.err
    other = madgen("generate", job_file, lora(0.25), "prompts.limit=1")
    assert other.code == 2
    assert "backbone.loras" in other.err
    key = json.loads(next((tmp_path / "out/shards").glob("*.json")).read_text(encoding="utf-8"))["samples"][0]["key"]
    assert "the same pixels" in madgen("regenerate", "out", key, "-o", "again.png").out
    save_lora(file, LAYERS["sd"], seed=3)
    changed = madgen("regenerate", "out", key, "-o", "again.png")
    assert changed.code == 2
    assert "style.safetensors: the weights on this machine" in changed.err
