"""LoRAs in the formats of other tools: W + scale * alpha / rank * up @ down, computed from the file."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from madgen.backbones import Lora
from madgen.backbones._loading import load_pipeline
from madgen.backbones._lora import fuse_loras
from madgen.hub.weights import ModelFiles
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
    pipeline = load_pipeline(ModelFiles(str(folder)), torch.float32, {})
    fuse_loras(pipeline, loras)
    return pipeline


def errors(folder, file, scale, expected):
    """Largest relative error of the change of any weight, and the number of layers that changed."""
    plain, fused = load(folder), load(folder, Lora(str(file), scale))
    worst, changed = 0.0, 0
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(plain, part, None) is None:
            continue
        for (name, before), (_, after) in zip(layers(getattr(plain, part)), layers(getattr(fused, part)), strict=True):
            delta, right = after.weight.double() - before.weight.double(), expected(part, name)
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
        product = up.flatten(1).double() @ down.flatten(1).double()
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
    assert worst <= 1e-5
    assert changed == sum(key.endswith("lora_down.weight") for key in tensors) > 20
    assert any("text_projection" in key for key in tensors) == (name == "sdxl")


def test_block_names_of_the_original_sdxl_code_are_understood(tiny_xl, tmp_path):
    tensors = kohya(load(tiny_xl), ("unet",), [1, 4], skip=r"^(?!down_blocks\.1\.attentions\.0\.transformer)")
    original = {key.replace("down_blocks_1_attentions_0", "input_blocks_3_1"): value for key, value in tensors.items()}
    save_file(original, tmp_path / "lora.safetensors")
    worst, changed = errors(tiny_xl, tmp_path / "lora.safetensors", 1.0, by_hand(tensors, 1.0))
    assert worst <= 1e-5
    assert changed == len(tensors) // 3 > 0


def test_a_lora_of_some_text_encoder_layers_is_applied(tiny, tmp_path):
    tensors = kohya(load(tiny), ("text_encoder",), [2], skip="out_proj|v_proj|fc")
    save_file(tensors, tmp_path / "lora.safetensors")
    worst, changed = errors(tiny, tmp_path / "lora.safetensors", 1.0, by_hand(tensors, 1.0))
    assert worst <= 1e-5
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
    assert (worst <= 1e-5, changed) == (True, len(names))


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("dora_scale", r"its dora_scale has the shape \[2\]"),
        ("hada_w1_a", "incomplete, or of two kinds: down, hada_w1_a, up"),
        ("lokr_w1", "incomplete, or of two kinds: down, lokr_w1, up"),
        ("diff", "incomplete, or of two kinds: diff, down, up"),
        ("w_norm", "incomplete, or of two kinds: down, up, w_norm"),
        ("oft_blocks", r"orthogonal factors \(OFT\)"),
        ("something", "tensors of an unknown kind: lora_unet_.*something"),
    ],
)
def test_tensors_that_cannot_be_applied_are_refused_by_name(suffix, message, tiny, tmp_path):
    tensors = kohya(load(tiny), ("unet",), [1])
    module = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{module}.{suffix}": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        load(tiny, Lora(str(tmp_path / "lora.safetensors"), 1.0))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_alphas_equal_the_same_file_with_alphas_multiplied_into_its_tensors(name, tiny, tiny_xl, tmp_path):
    """Different ranks and alphas in every layer, as kohya's `resize_lora` leaves them, in UNet and text encoders."""
    folder = {"sd": tiny, "sdxl": tiny_xl}[name]
    parts = ("unet", "text_encoder") if name == "sd" else ("unet", "text_encoder", "text_encoder_2")
    tensors = kohya(load(folder), parts, [1, 4, 0.5, 3])
    baked = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    for key in baked:
        if key.endswith(".lora_up.weight"):
            layer = key.removesuffix(".lora_up.weight")
            baked[key] = baked[key] * (float(tensors[f"{layer}.alpha"]) / len(tensors[f"{layer}.lora_down.weight"]))
    for kind, content in (("resized", tensors), ("baked", baked)):
        save_file(content, tmp_path / f"{kind}.safetensors")
    resized, same = (load(folder, Lora(str(tmp_path / f"{kind}.safetensors"), 0.8)) for kind in ("resized", "baked"))
    for part in parts:
        for key, value in getattr(resized, part).state_dict().items():
            assert torch.equal(value, getattr(same, part).state_dict()[key]), (part, key)


def test_a_layer_of_another_model_is_refused(tiny, tmp_path):
    tensors = kohya(load(tiny), ("text_encoder",), [1])
    other = {key.replace("layers_0", "layers_70"): value for key, value in tensors.items()}
    save_file(other, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="text_encoder has no layer text_model_encoder_layers_70"):
        load(tiny, Lora(str(tmp_path / "lora.safetensors"), 1.0))


def random_pairs(model, rank=2):
    """Return random `down` and `up` matrices of the attention projections of a UNet or a text encoder."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (
            torch.randn(rank, module.weight.shape[1], generator=generator),
            torch.randn(module.weight.shape[0], rank, generator=generator),
        )
        for name, module in model.named_modules()
        if re.search(r"attn1\.(to_q|to_out\.0)$|(q_proj|fc1)$", name)
    }


def attention_processor(name, role):
    layer, projection = re.fullmatch(r"(.*)\.(to_q|to_out)(?:\.0)?", name).groups()
    return f"{layer}.processor.{projection}_lora.{role}.weight"


LAYOUTS = {
    "diffusers": lambda part, name, role: f"{part}.{name}.lora.{role}.weight",
    "diffusers, former": lambda part, name, role: f"{part}.{name}.lora_linear_layer.{role}.weight",
    "peft": lambda part, name, role: f"{part}.{name}.lora_{'A' if role == 'down' else 'B'}.weight",
    "peft, of one model": lambda part, name, role: f"{name}.lora_{'A' if role == 'down' else 'B'}.weight",
    "dotted": lambda part, name, role: f"{part}.{name}.lora_{role}.weight",
    "text_model": lambda part, name, role: f"{part}.text_model.{name.removeprefix('text_model.')}.lora.{role}.weight",
    "attention processors": lambda part, name, role: f"{part}.{attention_processor(name, role)}",
    "attention processors, bare": lambda part, name, role: attention_processor(name, role),
}


def save_layout(path, layout, pairs, part, alphas=None, dtype=torch.float32, metadata=None):
    tensors = {}
    for index, (name, (down, up)) in enumerate(pairs.items()):
        tensors[LAYOUTS[layout](part, name, "down")] = down.to(dtype)
        tensors[LAYOUTS[layout](part, name, "up")] = up.to(dtype)
        if alphas is not None:
            key = LAYOUTS[layout](part, name, "down")
            tensors[re.sub(r"\.(lora\.down|lora_down|lora_A|down)\.weight$", ".alpha", key)] = torch.tensor(
                float(alphas[index % len(alphas)])
            )
    save_file(tensors, path, metadata=metadata)
    return path


def of_pairs(pairs, part, factor):
    def expected(of, name):
        if of != part or name not in pairs:
            return None
        return factor(name, list(pairs).index(name)) * pairs[name][1] @ pairs[name][0]

    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_applied_at_the_strength_of_its_alphas(layout, tiny, tmp_path):
    part = "text_encoder" if layout == "text_model" else "unet"
    pairs, alphas = random_pairs(getattr(load(tiny), part)), (1, 8, 0)
    file = save_layout(
        tmp_path / "lora.safetensors", layout, pairs, part, alphas if layout != "diffusers, former" else None
    )
    rank = 2

    def factor(name, index):
        return 0.5 * (alphas[index % 3] / rank if layout != "diffusers, former" else 1)

    kept = {name: pair for name, pair in pairs.items() if factor(name, list(pairs).index(name))}
    worst, changed = errors(
        tiny, file, 0.5, lambda of, name: of_pairs(pairs, part, factor)(of, name) if name in kept else None
    )
    assert worst <= 1e-5
    assert changed == len(kept) > 2


def test_metadata_of_diffusers_is_the_strength(tiny, tmp_path):
    pairs = random_pairs(load(tiny).unet)
    config = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_out.0": 1}, "unet.use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    file = save_layout(tmp_path / "lora.safetensors", "diffusers", pairs, "unet", metadata=metadata)
    worst, changed = errors(
        tiny, file, -1.0, of_pairs(pairs, "unet", lambda name, _: -(1 if "to_out" in name else 6) / 2**0.5)
    )
    assert worst <= 1e-5
    assert changed == len(pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stacked_loras_of_half_precision_add_up(dtype, tiny, tmp_path):
    pairs = {name: (a.to(dtype).float(), b.to(dtype).float()) for name, (a, b) in random_pairs(load(tiny).unet).items()}
    first = save_layout(tmp_path / "a.safetensors", "diffusers", pairs, "unet", (4,), dtype)
    second = save_layout(tmp_path / "b.safetensors", "peft", pairs, "unet", None, dtype)
    plain, fused = load(tiny), load(tiny, Lora(str(first), 0.5), Lora(str(second), -0.25))
    for name, (down, up) in pairs.items():
        before, after = (pipeline.unet.get_submodule(name).weight for pipeline in (plain, fused))
        right = (0.5 * 2 - 0.25) * up @ down
        assert float((after - before - right).detach().norm() / right.norm()) <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, q: t.update({f"unet.{q}.alpha": torch.tensor(float("nan"))}),
            "alpha has values that are not finite",
        ),
        (
            lambda t, q: t.update({f"unet.{q}.alpha": torch.tensor([1.0, 2.0])}),
            r"must be one number, got the shape \[2\]",
        ),
        (lambda t, q: t[f"unet.{q}.lora.up.weight"].fill_(float("inf")), "up.weight has values that are not finite"),
        (lambda t, q: t.pop(f"unet.{q}.lora.up.weight"), "lacks the up tensor of unet.down"),
        (lambda t, q: t.update({"unet.nowhere.lora.down.weight": t.pop(f"unet.{q}.lora.down.weight")}), "lacks the"),
        (lambda t, q: t.update({f"unet.{q}.lora.up.weight": torch.ones(8, 3)}), "has ranks 2 and 3"),
        (lambda t, q: t.update({f"unet.{q}.bias": torch.ones(8)}), "unknown kind: unet.down.*bias"),
        (lambda t, q: t.update({f"unet.{q}.lora_B.bias": torch.ones(8)}), "biases"),
        (
            lambda t, q: t.update({f"{q}.lora_A.weight": torch.ones(2, 8), f"{q}.lora_B.weight": torch.ones(8, 2)}),
            "twice",
        ),
    ],
)
def test_every_tensor_of_a_file_is_accounted_for(change, message, tiny, tmp_path):
    pairs = random_pairs(load(tiny).unet)
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    change(tensors, next(name for name in pairs if name.endswith("to_q")))
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load(tiny, Lora(str(tmp_path / "lora.safetensors"), 1.0))
    assert str(caught.value).count("LoRA") == 1


def test_a_peft_adapter_goes_to_the_text_encoder_that_it_fits(tiny_xl, tmp_path):
    pairs = random_pairs(load(tiny_xl).text_encoder_2)
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = down, up
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 2}), encoding="utf-8")
    worst, changed = errors(tiny_xl, tmp_path, 1.0, of_pairs(pairs, "text_encoder_2", lambda *_: 2))
    assert (worst <= 1e-5, changed) == (True, len(pairs))
