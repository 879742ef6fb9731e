"""LoHa, LoKr, CP, DoRA and full differences: LyCORIS' formulas in float64, and PEFT's merged weights."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from madgen.backbones import Lora
from madgen.backbones._loading import load_pipeline
from madgen.backbones._lora import fuse_loras
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

SCALE = -0.7
ALPHA, RANK = 3.0, 2


def load(folder, *loras, dtype=torch.float32):
    pipeline = load_pipeline(ModelFiles(str(folder)), dtype, {})
    fuse_loras(pipeline, loras)
    return pipeline


def tucker(core, up, down):
    """Sum over both ranks, for each position of the kernel: up [outputs, rank], down [rank, inputs]."""
    change = np.zeros((len(up), down.shape[1], *core.shape[2:]))
    for first, second in np.ndindex(core.shape[:2]):
        change += np.multiply.outer(np.outer(up[:, first], down[second]), core[first, second])
    return change


def halves(size):
    """Return the smallest factor of a size, and the other one."""
    factor = next(number for number in range(2, size + 1) if size % number == 0)
    return factor, size // factor


class Kinds:
    """Random tensors of a layer under LyCORIS' names, and the change of its weight by its formulas."""

    def __init__(self, seed, weight):
        self.random = np.random.default_rng(seed)
        self.weight = weight.detach().double().numpy()
        self.outputs, self.inputs, *self.kernel = self.weight.shape
        self.columns = self.inputs * int(np.prod(self.kernel))

    def draw(self, *shape):
        return self.random.normal(size=shape).astype(np.float32)

    def lora(self):
        down, up = self.draw(RANK, self.inputs, *self.kernel), self.draw(self.outputs, RANK, *[1] * len(self.kernel))
        change = up.reshape(self.outputs, RANK).astype(float) @ down.reshape(RANK, -1)
        return {"lora_down.weight": down, "lora_up.weight": up}, ALPHA / RANK * change

    def cp(self):
        ones = [1] * len(self.kernel)
        down, up = self.draw(RANK, self.inputs, *ones), self.draw(self.outputs, RANK, *ones)
        core = self.draw(RANK, RANK, *self.kernel)
        change = tucker(core, up.reshape(self.outputs, RANK), down.reshape(RANK, self.inputs))
        return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core}, ALPHA / RANK * change

    def loha(self):
        a, b, c, d = (self.draw(*shape) for shape in [(self.outputs, RANK), (RANK, self.columns)] * 2)
        change = (a.astype(float) @ b) * (c.astype(float) @ d)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, ALPHA / RANK * change

    def loha_tucker(self):
        a, b, c, d = (self.draw(*shape) for shape in [(RANK, self.outputs), (RANK, self.inputs)] * 2)
        first, second = self.draw(RANK, RANK, *self.kernel), self.draw(RANK, RANK, *self.kernel)
        change = tucker(first, a.T, b) * tucker(second, c.T, d)
        tensors = {"hada_t1": first, "hada_w1_a": a, "hada_w1_b": b, "hada_t2": second, "hada_w2_a": c, "hada_w2_b": d}
        return tensors, ALPHA / RANK * change

    def lokr(self):
        """Two whole matrices: alpha does not count."""
        (a, c), (b, d) = halves(self.outputs), halves(self.inputs)
        left, right = self.draw(a, b), self.draw(c, d, *self.kernel)
        return {"lokr_w1": left, "lokr_w2": right}, self.kron(left, right)

    def lokr_factored(self):
        (a, c), (b, d) = halves(self.outputs), halves(self.inputs)
        left, up, down = self.draw(a, b), self.draw(c, RANK), self.draw(RANK, d, *self.kernel)
        right = (up.astype(float) @ down.reshape(RANK, -1)).reshape(c, d, *self.kernel)
        return {"lokr_w1": left, "lokr_w2_a": up, "lokr_w2_b": down}, ALPHA / RANK * self.kron(left, right)

    def lokr_both(self):
        (a, c), (b, d) = halves(self.outputs), halves(self.inputs)
        first, second = self.draw(a, RANK), self.draw(RANK, b)
        up, down = self.draw(c, RANK), self.draw(RANK, d, *self.kernel)
        right = (up.astype(float) @ down.reshape(RANK, -1)).reshape(c, d, *self.kernel)
        tensors = {"lokr_w1_a": first, "lokr_w1_b": second, "lokr_w2_a": up, "lokr_w2_b": down}
        return tensors, ALPHA / RANK * self.kron(first.astype(float) @ second, right)

    def lokr_tucker(self):
        (a, c), (b, d) = halves(self.outputs), halves(self.inputs)
        left, up, down = self.draw(a, b), self.draw(RANK, c), self.draw(RANK, d)
        core = self.draw(RANK, RANK, *self.kernel)
        tensors = {"lokr_w1": left, "lokr_w2_a": up, "lokr_w2_b": down, "lokr_t2": core}
        return tensors, ALPHA / RANK * self.kron(left, tucker(core, up.T, down))

    def kron(self, left, right):
        return np.kron(left.reshape(*left.shape, *[1] * len(self.kernel)).astype(float), right)

    def dora_rows(self, kind="lora"):
        tensors, change = getattr(self, kind)()
        magnitude = 1 + self.draw(self.outputs, *[1] * (1 + len(self.kernel))) ** 2
        return {**tensors, "dora_scale": magnitude}, self.decomposed(change, magnitude, 0)

    def dora_columns(self, kind="lora"):
        tensors, change = getattr(self, kind)()
        magnitude = 1 + self.draw(1, self.inputs, *[1] * len(self.kernel)) ** 2
        return {**tensors, "dora_scale": magnitude}, self.decomposed(change, magnitude, 1)

    def decomposed(self, change, magnitude, axis):
        """Give the rows (outputs) or columns (inputs) of W + change the norms `magnitude`."""
        direction = self.weight + change.reshape(self.weight.shape)
        others = tuple(number for number in range(direction.ndim) if number != axis)
        return magnitude * direction / np.sqrt((direction**2).sum(others, keepdims=True)) - self.weight

    def loha_dora(self):
        return self.dora_columns("loha")

    def lokr_dora(self):
        return self.dora_rows("lokr_factored")

    def diff(self):
        change = self.draw(*self.weight.shape)
        return {"diff": change}, change


LINEAR = [
    "loha", "lokr", "lokr_factored", "lokr_both", "dora_rows", "dora_columns", "loha_dora", "lokr_dora", "diff", "lora",
]  # fmt: skip
CONVOLUTION = [*LINEAR, "cp", "loha_tucker", "lokr_tucker"]


def kinds_of(module):
    if isinstance(module, torch.nn.Conv2d):
        return CONVOLUTION if module.kernel_size != (1, 1) else LINEAR
    return LINEAR if isinstance(module, torch.nn.Linear) else ()


def random_file(model, prefix="lora_unet"):
    """Return tensors of every kind in turn, for linear layers and convolutions, and the changes by module."""
    tensors, changes, turn = {}, {}, {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if not (kinds := kinds_of(module)):
            continue
        kind = next(turn.setdefault(f"{type(module).__name__} {len(kinds)}", itertools.cycle(kinds)))
        own, change = getattr(Kinds(seed, module.weight), kind)()
        layer = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{layer}.{role}": torch.from_numpy(value) for role, value in own.items()}
        tensors |= {f"{layer}.alpha": torch.tensor(ALPHA)} if "diff" not in own else {}
        changes[name] = kind, change.reshape(module.weight.shape)
    return tensors, changes


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
def test_every_kind_of_layer_changes_by_its_formula(name, prefix, tiny, tiny_xl, tmp_path):
    folder = {"sd": tiny, "sdxl": tiny_xl}[name]
    plain = load(folder).unet
    tensors, changes = random_file(plain, prefix)
    save_file(tensors, tmp_path / "lycoris.safetensors")
    adapted = load(folder, Lora(str(tmp_path / "lycoris.safetensors"), SCALE)).unet
    assert {kind for kind, _ in changes.values()} == set(CONVOLUTION)
    for layer, (kind, change) in changes.items():
        before, after = (model.get_submodule(layer).weight.detach().double().numpy() for model in (plain, adapted))
        expected = before + SCALE * change
        assert np.abs(after - expected).max() <= 1e-5 * np.abs(expected).max(), (layer, kind)
    for key, value in plain.state_dict().items():
        if key.removesuffix(".weight") not in changes:
            assert torch.equal(value, adapted.state_dict()[key]), key


def test_dora_at_its_full_scale_has_the_magnitudes_of_the_file_and_none_at_zero(tiny, tmp_path):
    plain = load(tiny).unet
    layer = "down_blocks.0.resnets.0.conv1"
    own, _ = Kinds(1, plain.get_submodule(layer).weight).dora_columns()
    tensors = {f"lora_unet_{layer.replace('.', '_')}.{role}": torch.from_numpy(value) for role, value in own.items()}
    save_file(tensors, tmp_path / "dora.safetensors")
    full, none = (load(tiny, Lora(str(tmp_path / "dora.safetensors"), scale)).unet for scale in (1.0, 0.0))
    norms = torch.linalg.vector_norm(full.get_submodule(layer).weight, dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(norms.detach(), torch.from_numpy(own["dora_scale"]), rtol=1e-5, atol=0)
    assert torch.equal(none.get_submodule(layer).weight, plain.get_submodule(layer).weight)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "LOKR of whole matrices"])
@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_peft_adapters_give_the_weights_that_peft_merges(kind, part, tiny_xl, tmp_path):
    import peft

    model = getattr(load(tiny_xl), part)
    targets = r".*(attn1\.to_q|conv1)" if part == "unet" else r".*(q_proj|fc1)"
    config = {"r": 8 if "whole" in kind else 2, "alpha": 3, "target_modules": targets}
    config["alpha_pattern"] = {"conv1|fc1": 5}
    cls = peft.LoHaConfig if kind == "LOHA" else peft.LoKrConfig
    # conv1 by Tucker's decomposition; two whole matrices where the rank is as large as they are
    adapter = peft.get_peft_model(model, cls(**config, use_effective_conv2d=part == "unet"))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapter.named_parameters():
        if "hada" in name or "lokr" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapter.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == kind[:4]
    if "whole" in kind:
        assert not any("w2_a" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    merged = adapter.merge_and_unload().state_dict()
    adapted, plain = (getattr(load(tiny_xl, *loras), part) for loras in ([Lora(str(tmp_path), 1.0)], []))
    changed = 0
    for key, value in adapted.state_dict().items():
        torch.testing.assert_close(value, merged[key], rtol=1e-5, atol=1e-5)
        changed += not torch.equal(value, plain.state_dict()[key])
    assert changed >= 4


def norm_and_bias(model):
    """Return the tensors of a norm, and of a layer with a bias."""
    return {
        "conv_norm_out": {"w_norm": model.conv_norm_out.weight, "b_norm": model.conv_norm_out.bias},
        "conv_in": {"diff": model.conv_in.weight, "diff_b": model.conv_in.bias},
    }


def test_differences_of_norms_and_biases_are_added(tiny, tmp_path):
    plain = load(tiny).unet
    differences = {
        f"lora_unet_{layer}.{role}": torch.full_like(value, 0.25).detach()
        for layer, tensors in norm_and_bias(plain).items()
        for role, value in tensors.items()
    }
    save_file(differences, tmp_path / "full.safetensors")
    adapted = load(tiny, Lora(str(tmp_path / "full.safetensors"), SCALE)).unet
    for layer, tensors in norm_and_bias(plain).items():
        for role, before in tensors.items():
            torch.testing.assert_close(norm_and_bias(adapted)[layer][role], before + SCALE * 0.25)


def test_half_precision_rounds_once(tiny, tmp_path):
    """Weights in bfloat16 are adapted in float32."""
    plain = load(tiny).unet
    tensors, changes = random_file(plain)
    save_file(tensors, tmp_path / "a.safetensors")
    file = Lora(str(tmp_path / "a.safetensors"), 0.5)
    before, adapted = (load(tiny, *loras, dtype=torch.bfloat16).unet for loras in ([], [file]))
    layer = next(name for name, (kind, _) in changes.items() if kind == "loha")
    change = torch.from_numpy(changes[layer][1])
    expected = before.get_submodule(layer).weight.double() + 0.5 * change
    assert adapted.get_submodule(layer).weight.dtype == torch.bfloat16
    torch.testing.assert_close(adapted.get_submodule(layer).weight.double(), expected, rtol=2**-8, atol=1e-6)


CHANGES = [
    (lambda own: own.pop("hada_w2_b"), "incomplete, or of two kinds: hada_w1_a, hada_w1_b, hada_w2_a$"),
    (lambda own: own.update(diff=np.ones((8, 8), np.float32)), "of two kinds: diff, hada_w1_a"),
    (lambda own: own.update(hada_w1_a=np.ones((9, 2), np.float32), hada_w2_a=np.ones((9, 2), np.float32)), r"\[9, 8\]"),
    (lambda own: own.update(hada_w1_a=np.ones((8, 3), np.float32)), r"attn1.to_q do not fit together: .*mat1 and mat2"),
    (lambda own: own.update(hada_w1_a=np.full((8, 2), np.nan, np.float32)), "values that are not finite"),
    (lambda own: own.update(dora_scale=np.ones(3, np.float32)), r"dora_scale has the shape \[3\], expected \[8, 1\]"),
    (lambda own: own.update(diff_b=np.ones(8, np.float32)), "of two kinds: diff_b, hada_w1_a"),
    (lambda own: own.update(scalar=np.ones(1, np.float32)), "of an unknown kind: .*scalar"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_layers_that_cannot_be_applied_in_full_are_refused(change, message, tiny, tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    own, _ = Kinds(1, load(tiny).unet.get_submodule(layer).weight).loha()
    change(own)
    flat = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{flat}.{role}": torch.from_numpy(value) for role, value in own.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load(tiny, Lora(str(tmp_path / "a.safetensors"), 1.0))
    assert "\n" not in str(caught.value)


def test_a_bias_that_the_backbone_does_not_have_is_refused(tiny, tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    flat = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{flat}.diff": torch.ones(8, 8), f"{flat}.diff_b": torch.ones(8)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"attn1.to_q: it changes a bias that this layer of the backbone does not have"):
        load(tiny, Lora(str(tmp_path / "a.safetensors"), 1.0))
