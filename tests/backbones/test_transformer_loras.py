"""LoRAs of transformers, compared with diffusers' own fusing."""

import pytest
import torch
from tiny_transformers import folder_of, load

from madgen import UserError


def lora(folder, layers, names):
    """Write a LoRA of rank 2 with alpha 1; `names` are those of the file's factors."""
    from safetensors.torch import save_file

    generator, state = torch.Generator().manual_seed(0), {}
    for layer, (width, out) in layers.items():
        for name, shape in zip(names, ((2, width), (out, 2)), strict=True):
            state[f"{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
        if names[0] == "lora_down":
            state[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(state, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "layers", "names"),
    [
        ("flux", {"transformer.transformer_blocks.0.attn.to_q": (32, 32)}, ("lora_A", "lora_B")),
        ("flux", {"lora_unet_double_blocks_0_img_attn_qkv": (32, 96)}, ("lora_down", "lora_up")),
        ("sd3", {"transformer.transformer_blocks.1.ff.net.2": (128, 32)}, ("lora_A", "lora_B")),
        ("flux2", {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (32, 288)}, ("lora_A", "lora_B")),
        ("z_image", {"transformer.layers.1.attention.to_q": (48, 48)}, ("lora_A", "lora_B")),
        ("qwen_image", {"transformer.transformer_blocks.0.attn.to_q": (32, 32)}, ("lora_A", "lora_B")),
    ],
    ids=["flux", "flux-kohya", "sd3", "flux2", "z_image", "qwen_image"],
)
def test_loras_are_fused_as_diffusers_fuses_them(tmp_path, name, layers, names):
    import diffusers

    file = lora(tmp_path, layers, names)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder_of(name))
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(file, adapter_name="style")
    pipe.fuse_lora(components=["transformer"], lora_scale=0.7, adapter_names=["style"])
    pipe.unload_lora_weights()
    fused = load(name, loras=[{"weights": file, "scale": 0.7}]).backbone.transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        assert torch.allclose(fused[key], value, atol=1e-6)
    changed = sum(not torch.equal(fused[key], value) for key, value in before.items())
    assert changed == (3 if "lora_unet" in str(layers) else 1)  # q, k and v


def test_a_lora_that_diffusers_cannot_convert_is_refused(tmp_path):
    layers = {"lora_unet_joint_blocks_0_x_block_attn_qkv": (32, 96)}
    file = lora(tmp_path, layers, ("lora_down", "lora_up"))
    with pytest.raises(
        UserError, match="has kohya's layout, which diffusers cannot convert for StableDiffusion3Pipeline"
    ):
        load("sd3", loras=[{"weights": file, "scale": 1.0}])
