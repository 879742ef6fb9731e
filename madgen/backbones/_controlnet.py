"""ControlNets: a copy of the UNet's encoder that follows a control picture, such as edges or depth, in each view.

A view gets its own crop of the picture, and the ControlNet's attention merges in the same layers and steps as the
UNet's: it was trained beside that UNet, so it has to see the same hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from madgen.hub.weights import loading, single_file
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

KEY = "backbone.controlnet.weights"
SHAPES = (
    "in_channels",
    "cross_attention_dim",
    "block_out_channels",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""Keys of the config that a ControlNet shares with its UNet."""


def load_controlnet(weights: str, unet: Any, factor: int, dtype: torch.dtype) -> Any:
    """Load a diffusers folder, a Hub id or a single `.safetensors` file; UserError if it does not fit the UNet."""
    from diffusers import ControlNetModel

    file = single_file(weights, KEY)
    with loading(KEY, weights):
        if file is None:
            folder = expand_user(weights, KEY)
            source = str(folder) if folder.is_dir() else weights
            network = ControlNetModel.from_pretrained(source, use_safetensors=True, torch_dtype=dtype)
        else:
            network = _from_file(file, unet).to(dtype)
    check_controlnet(network.config, unet.config, factor, f"{KEY}={weights}")
    missing = [name for name, value in network.named_parameters() if value.is_meta]
    if missing:
        raise UserError(f"{KEY}={weights} lacks weights: {missing[0]}")
    return network


def _from_file(file: Path, unet: Any) -> Any:
    """Load a file without config, in diffusers' or the original layout, as a copy of the UNet's encoder."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
    from safetensors.torch import load_file

    state = load_file(file)
    blocks = sorted({key.split(".")[2] for key in state if key.startswith("controlnet_cond_embedding.blocks.")})
    network = ControlNetModel.from_unet(
        unet,
        load_weights_from_unet=False,
        **({"conditioning_embedding_out_channels": _embedding_channels(state, len(blocks))} if blocks else {}),
    )
    network.load_state_dict(convert_controlnet_checkpoint(state, network.config))
    return network


def _embedding_channels(state: Mapping[str, torch.Tensor], blocks: int) -> tuple[int, ...]:
    """Return the channels of the layers that encode the control picture, which a UNet's config does not have."""
    first = len(state["controlnet_cond_embedding.conv_in.weight"])
    odd = (len(state[f"controlnet_cond_embedding.blocks.{index}.weight"]) for index in range(1, blocks, 2))
    return (first, *odd)


def check_controlnet(config: Any, unet: Any, factor: int, name: str) -> None:
    """Raise UserError if a ControlNet with this config does not fit a UNet's config, or needs guess mode."""
    for key in SHAPES:
        ours, theirs = config.get(key), unet.get(key)
        if _plain(ours) != _plain(theirs):
            raise UserError(
                f"{name} is a ControlNet for another model: its {key} is {_plain(ours)}, the backbone's "
                f"{_plain(theirs)}; use one made for this backbone"
            )
    scaled = 2 ** (len(config.get("conditioning_embedding_out_channels") or (0, 0, 0, 0)) - 1)
    if scaled != factor:
        raise UserError(
            f"{name} is a ControlNet for another model: it takes {scaled} pixels per latent cell, the backbone {factor}"
        )
    if config.get("global_pool_conditions"):
        raise UserError(
            f"{name} needs guess mode (global_pool_conditions), which is not supported; use a ControlNet without it"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
