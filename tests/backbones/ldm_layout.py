"""Writes pipelines as one file in the layout of the original Stable Diffusion code, as such files are passed around.

For models of any number of levels with CLIP text encoders; the names are those of the original code's modules.
"""

import re

import torch

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def save_single_file(pipeline, path):
    """Every model of a Stable Diffusion (XL) pipeline in one `.safetensors` file."""
    from safetensors.torch import save_file

    tensors = {f"model.diffusion_model.{key}": value for key, value in unet_tensors(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae_tensors(pipeline.vae).items()}
    is_xl = hasattr(pipeline, "text_encoder_2")
    prefix = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{prefix}text_model.{key.removeprefix('text_model.')}"] = value
    if is_xl:
        second = open_clip_tensors(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


def unet_tensors(unet):
    blocks = dict(UNET_ENDS)
    count = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{count}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{count}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{count}.1"
            count += 1
        place = 2 if getattr(block, "attentions", None) else 1
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{place}.conv"
    return {rename(key, blocks, RESNET, ".resnets."): value for key, value in unet.state_dict().items()}


def vae_tensors(vae):
    last = len(vae.decoder.up_blocks) - 1
    tensors = {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", key)
        key = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", key)
        key = re.sub(r"decoder\.up_blocks\.(\d+)\.", lambda found: f"decoder.up.{last - int(found[1])}.", key).replace(
            ".upsamplers.0.", ".upsample."
        )
        key = re.sub(r"(up\.\d+)\.resnets\.", r"\1.block.", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
        if "mid_block.attentions.0." in key:
            head, _, rest = key.partition("mid_block.attentions.0.")
            key = f"{head}mid.attn_1.{rename(rest, VAE_ATTENTION)}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        tensors[key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = value
    return tensors


def open_clip_tensors(state):
    tensors = {"text_projection": state["text_projection.weight"].T}
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    names = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
    }
    names |= {"positional_embedding": "embeddings.position_embedding.weight", "ln_final.bias": "final_layer_norm.bias"}
    tensors |= {name: state[source] for name, source in names.items()}
    for key, value in state.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.(.*)", key)
        if layer is None or re.search(r"[qkv]_proj", key):
            continue
        tensors[f"transformer.resblocks.{layer[1]}.{rename(layer[2], OPEN_CLIP)}"] = value
    layers = sorted({found[1] for key in state if (found := re.match(r"encoder\.layers\.(\d+)\.", key))})
    for layer in layers:
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return tensors


def rename(key, names, inner=None, inside=""):
    """`key` with its longest known beginning replaced; where it contains `inside`, also the rest by `inner`."""
    for old in sorted(names, key=len, reverse=True):
        if key == old or key.startswith(old + "."):
            rest = key[len(old) + 1 :]
            return f"{names[old]}.{rename(rest, inner) if inner and inside in key else rest}"
    return key
