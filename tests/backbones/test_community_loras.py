"""LoRAs in the formats of other tools: W + scale * alpha / rank * up @ down, computed from the file."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from madgen.backbones import Lora
from madgen.backbones._loading import load_pipeline
from madgen.utils.errors import UserError

PARTS = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def layers(model):
    """Linear and convolutional layers of the attention blocks, and of text encoders."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and re.search(
            r"attentions|layers\.|text_projection", name
        ):
            yield name, module


def kohya(pipeline, parts, alphas, skip="never"):
    """A LoRA in kohya's layout over all layers: ranks 1 to 3, and `alphas` (None: no alpha) in turn."""
    generator = torch.Generator().manual_seed(3)
    tensors, count = {}, 0
    for part in parts:
        for name, module in layers(getattr(pipeline, part)):
            if re.search(skip, name):
                continue
            rank, alpha, count = 1 + count % 3, alphas[count % len(alphas)], count + 1
            outputs, inputs, *kernel = module.weight.shape
            prefix = f"{PARTS[part]}_{_old(part, name).replace('.', '_')}"
            tensors[f"{prefix}.lora_down.weight"] = torch.randn(rank, inputs, *kernel, generator=generator)
            tensors[f"{prefix}.lora_up.weight"] = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator)
            if alpha is not None:
                tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _old(part, name):
    """kohya's names of text encoder layers begin with `text_model`, whatever transformers calls them."""
    return name if part == "unet" or name.startswith("text_") else f"text_model.{name}"


def load(folder, *loras):
    return load_pipeline(
        str(folder), revision=None, variant=None, config=None, loras=loras, dtype=torch.float32,
    )  # fmt: skip


def errors(folder, file, scale, expected):
    """Largest relative error of the change of any weight, and the number of layers that changed."""
    plain, fused = load(folder), load(folder, Lora(str(file), scale))
    worst, changed = 0.0, 0
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(plain, part, None) is None:
            continue
        for (name, before), (_, after) in zip(layers(getattr(plain, part)), layers(getattr(fused, part)), strict=True):
            delta, right = after.weight - before.weight, expected(part, name)
            if right is None:
                assert not delta.any(), (part, name)
            else:
                worst, changed = max(worst, float((delta - right).detach().norm() / right.norm())), changed + 1
    return worst, changed


def by_hand(tensors, scale):
    def expected(part, name):
        prefix = f"{PARTS[part]}_{_old(part, name).replace('.', '_')}"
        if f"{prefix}.lora_down.weight" not in tensors:
            return None
        down, up = tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"]
        alpha = tensors.get(f"{prefix}.alpha", torch.tensor(float(len(down))))
        product = (up.flatten(1).double() @ down.flatten(1).double()).float()
        return scale * float(alpha) / len(down) * product.reshape(len(up), *down.shape[1:])

    return expected


@pytest.mark.parametrize("alphas", [[1], [1, 4, 0.5], [1, None], [None]], ids=str)
@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_each_module_is_scaled_by_its_own_alpha_and_rank(name, alphas, tiny, tiny_xl, tmp_path):
    folder = {"sd": tiny, "sdxl": tiny_xl}[name]
    pipeline = load(folder)
    parts = ("unet", "text_encoder") if name == "sd" else ("unet", "text_encoder", "text_encoder_2")
    tensors = kohya(pipeline, parts, alphas)
    if name == "sdxl":
        tensors = {key.replace("lora_te_", "lora_te1_"): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    tensors = {key.replace("lora_te1_", "lora_te_"): value for key, value in tensors.items()}
    worst, changed = errors(folder, tmp_path / "lora.safetensors", -0.7, by_hand(tensors, -0.7))
    assert worst <= 1e-4
    assert changed == sum(key.endswith("lora_down.weight") for key in tensors) > 20
    assert any("text_projection" in key for key in tensors) == (name == "sdxl")


def test_block_names_of_the_original_sdxl_code_are_understood(tiny_xl, tmp_path):
    tensors = kohya(load(tiny_xl), ("unet",), [1, 4], skip=r"^(?!down_blocks\.1\.attentions\.0\.transformer)")
    original = {key.replace("down_blocks_1_attentions_0", "input_blocks_3_1"): value for key, value in tensors.items()}
    save_file(original, tmp_path / "lora.safetensors")
    worst, changed = errors(tiny_xl, tmp_path / "lora.safetensors", 1.0, by_hand(tensors, 1.0))
    assert worst <= 1e-4
    assert changed == len(tensors) // 3 > 0


def test_a_lora_of_some_text_encoder_layers_is_applied(tiny, tmp_path):
    tensors = kohya(load(tiny), ("text_encoder",), [2], skip="out_proj|v_proj|fc")
    save_file(tensors, tmp_path / "lora.safetensors")
    worst, changed = errors(tiny, tmp_path / "lora.safetensors", 1.0, by_hand(tensors, 1.0))
    assert worst <= 1e-4
    assert changed == len(tensors) // 3 > 0


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_peft_adapter_folder_is_applied(part, rslora, tiny, tmp_path):
    model = getattr(load(tiny), part)
    generator, tensors, rank = torch.Generator().manual_seed(1), {}, 4
    names = [name for name, module in layers(model) if isinstance(module, torch.nn.Linear)]
    for name in names:
        outputs, inputs = model.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "use_rslora": rslora, "alpha_pattern": {"fc1|to_q": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    def expected(of, name):
        if of != part or name not in names:
            return None
        alpha = 2 if name.endswith(("fc1", "to_q")) else 8
        product = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        return 0.5 * alpha / (rank**0.5 if rslora else rank) * product

    worst, changed = errors(tiny, tmp_path, 0.5, expected)
    assert (worst <= 1e-4, changed) == (True, len(names))


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("dora_scale", r"weight decomposition \(DoRA\)"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "CP-decomposed"),
        ("diff", "full weight differences"),
        ("w_norm", "full weight differences"),
        ("something", "cannot be applied: lora_unet_.*something"),
    ],
)
def test_tensors_that_cannot_be_applied_are_refused_by_name(suffix, message, tiny, tmp_path):
    tensors = kohya(load(tiny), ("unet",), [1])
    module = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{module}.{suffix}": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        load(tiny, Lora(str(tmp_path / "lora.safetensors"), 1.0))


def test_a_layer_of_another_model_is_refused(tiny, tmp_path):
    tensors = kohya(load(tiny), ("text_encoder",), [1])
    other = {key.replace("layers_0", "layers_70"): value for key, value in tensors.items()}
    save_file(other, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="text_encoder has no layer text_model_encoder_layers_70"):
        load(tiny, Lora(str(tmp_path / "lora.safetensors"), 1.0))
