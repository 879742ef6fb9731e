"""Tensors of FLUX.1 and Stable Diffusion 3 transformers under their original names: diffusers' conversion, inverted."""

import inspect

import torch

PROJECTIONS = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def stacked(state, block, names, kind):
    """Return projections of one block, one below the other, which the originals keep as one matrix."""
    return torch.cat([state[f"{block}.{name}.{kind}"] for name in names])


def swapped(weight):
    """Return the halves of a modulation, shift and scale, in the other order."""
    return torch.cat(weight.chunk(2)[::-1])


def renamed(state, pairs):
    """Rename modules: `pairs` of the original's name and diffusers' name."""
    return {
        f"{original}.{kind}": state[f"{ours}.{kind}"]
        for original, ours in pairs
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in state
    }


def flux_tensors(transformer):
    """Return the tensors of a FLUX.1 transformer as Black Forest Labs publishes them."""
    state, tensors = transformer.state_dict(), {}
    pairs = [("txt_in", "context_embedder"), ("img_in", "x_embedder"), ("final_layer.linear", "proj_out")]
    for original, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        pairs += [
            (f"{original}.{layer}_layer", f"time_text_embed.{ours}_embedder.linear_{number}")
            for number, layer in ((1, "in"), (2, "out"))
        ]
    for i in range(transformer.config.num_layers):
        block, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, norm, ff, out, names, norms in (
            ("img", "norm1", "ff", "to_out.0", PROJECTIONS, ("norm_q", "norm_k")),
            ("txt", "norm1_context", "ff_context", "to_add_out", ADDED, ("norm_added_q", "norm_added_k")),
        ):
            pairs += [
                (f"{block}.{stream}_mod.lin", f"{ours}.{norm}.linear"),
                (f"{block}.{stream}_mlp.0", f"{ours}.{ff}.net.0.proj"),
                (f"{block}.{stream}_mlp.2", f"{ours}.{ff}.net.2"),
                (f"{block}.{stream}_attn.proj", f"{ours}.attn.{out}"),
            ]
            for kind in ("weight", "bias"):
                tensors[f"{block}.{stream}_attn.qkv.{kind}"] = stacked(state, f"{ours}.attn", names, kind)
            for original, norm_name in zip(("query_norm", "key_norm"), norms, strict=True):
                tensors[f"{block}.{stream}_attn.norm.{original}.scale"] = state[f"{ours}.attn.{norm_name}.weight"]
    for i in range(transformer.config.num_single_layers):
        block, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        pairs += [(f"{block}.modulation.lin", f"{ours}.norm.linear"), (f"{block}.linear2", f"{ours}.proj_out")]
        names = [*(f"attn.{name}" for name in PROJECTIONS), "proj_mlp"]
        for kind in ("weight", "bias"):
            tensors[f"{block}.linear1.{kind}"] = stacked(state, ours, names, kind)
        for original, norm_name in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            tensors[f"{block}.norm.{original}.scale"] = state[f"{ours}.attn.{norm_name}.weight"]
    for kind in ("weight", "bias"):
        tensors[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
    return tensors | renamed(state, pairs)


def sd3_tensors(transformer):
    """Return the tensors of a Stable Diffusion 3 transformer as Stability AI publishes them."""
    state, tensors = transformer.state_dict(), {}
    pairs = [("x_embedder.proj", "pos_embed.proj"), ("context_embedder", "context_embedder")]
    pairs += [("final_layer.linear", "proj_out")]
    for original, ours in (("t_embedder", "timestep"), ("y_embedder", "text")):
        pairs += [(f"{original}.mlp.{n}", f"time_text_embed.{ours}_embedder.linear_{m}") for n, m in ((0, 1), (2, 2))]
    tensors["pos_embed"] = state["pos_embed.pos_embed"]
    last = transformer.config.num_layers - 1
    dual = transformer.config.dual_attention_layers
    for i in range(last + 1):
        block, ours = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        attentions = [("x_block.attn", "attn", PROJECTIONS, "to_out.0", ("norm_q", "norm_k"))]
        attentions += [("context_block.attn", "attn", ADDED, "to_add_out", ("norm_added_q", "norm_added_k"))]
        attentions += [("x_block.attn2", "attn2", PROJECTIONS, "to_out.0", ("norm_q", "norm_k"))] if i in dual else []
        for original, layer, names, out, norms in attentions:
            pairs += [(f"{block}.{original}.proj", f"{ours}.{layer}.{out}")]
            pairs += [
                (f"{block}.{original}.{name}", f"{ours}.{layer}.{norm}")
                for name, norm in zip(("ln_q", "ln_k"), norms, strict=True)
            ]
            for kind in ("weight", "bias"):
                tensors[f"{block}.{original}.qkv.{kind}"] = stacked(state, f"{ours}.{layer}", names, kind)
        for stream, norm, ff in (("x_block", "norm1", "ff"), ("context_block", "norm1_context", "ff_context")):
            pairs += [(f"{block}.{stream}.mlp.fc{n}", f"{ours}.{ff}.net.{m}") for n, m in ((1, "0.proj"), (2, "2"))]
            for kind in ("weight", "bias"):
                modulation = state[f"{ours}.{norm}.linear.{kind}"]
                ends = i == last and stream == "context_block"
                tensors[f"{block}.{stream}.adaLN_modulation.1.{kind}"] = swapped(modulation) if ends else modulation
    for kind in ("weight", "bias"):
        tensors[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
    return tensors | renamed(state, pairs)


def convert_width(monkeypatch, width):
    """Let diffusers' conversion of FLUX.1, which is written for a width of 3072, convert a transformer of `width`."""
    from diffusers.loaders import single_file_model, single_file_utils

    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), names)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    converter = names["convert_flux_transformer_checkpoint_to_diffusers"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", converter)
