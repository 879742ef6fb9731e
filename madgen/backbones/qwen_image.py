"""Qwen-Image: double stream blocks with positions that are counted from the middle of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from madgen.backbones import BackboneSpec
from madgen.backbones._conditioning import Conditioning
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._sizes import QWEN25_VL_7B, QWEN_PIXEL, QWEN_VAE
from madgen.backbones._tokens import canvas_ids, pack, rotations, unpack
from madgen.backbones._transformer import PackedTransformerBackbone
from madgen.backbones._transformer_family import VIEW_SIZE, transformer_size, transformer_spec
from madgen.diffusion.guidance import norm_rescaled
from madgen.diffusion.views import Views
from madgen.hub.model_size import Parameters
from madgen.hub.weights import ModelFiles
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

THETA = 10000.0
MAX_SIDE = 2 * 2 * (4096 - 1024)
"""Latent cells: tables of positions end at 4096 tokens from the middle, with room for 1024 tokens of the prompt."""


class QwenImage(PackedTransformerBackbone):
    """Qwen-Image: last hidden states of Qwen2.5-VL, and guidance that keeps the norm of each token."""

    name = "qwen_image"
    pipelines = ("QwenImagePipeline",)
    sequence_length = 512
    max_length = 1024
    pads = True
    flow = FlowSchedule(linear_sigmas=True)
    widths_alive = 15.0
    assumed_specs = {"": transformer_spec(16, VIEW_SIZE, "cfg", max_side=MAX_SIDE)}
    assumed_sizes = {
        "": transformer_size(
            Parameters(20_430_401_088, 20_424_818_688, 5_548_096),
            (QWEN25_VL_7B,),
            3072,
            widths_alive,
            QWEN_VAE,
            QWEN_PIXEL,
        )
    }

    @classmethod
    def configs(cls, files: ModelFiles) -> tuple[dict[str, Any], ...]:
        """Read the config files; UserError for a transformer that needs other inputs."""
        configs = super().configs(files)
        for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if configs[1].get(key):
                raise UserError(f"backbone.pretrained={files.pretrained}: a transformer with {key} is not supported")
        return configs

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        return transformer_spec(network["in_channels"] // 4, VIEW_SIZE, "cfg", vae, MAX_SIDE)

    @staticmethod
    def layer_names(config: Mapping[str, Any]) -> list[str]:
        return [f"transformer_blocks.{i}.attn" for i in range(config["num_layers"])]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Rescale each token of the guided prediction to the norm of the conditional one."""
        negative, positive = (pack(each.flatten(0, 1)) for each in (unconditional, conditional))
        return unpack(norm_rescaled(negative, positive, scale), *conditional.shape[-2:]).view_as(conditional)

    def inputs(self, conditioning: Conditioning, views: int, height: int, width: int) -> dict[str, Any]:
        """Return the mask of the prompts' tokens and the shapes of the images."""
        mask = conditioning.text_mask_NT
        return {
            "encoder_hidden_states_mask": None if mask is None else mask.repeat_interleave(views, 0),
            "img_shapes": [[(1, height, width)]] * (conditioning.paths * views),
        }

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the rotations of canvas and prompt, which begins beyond the image: the canvas, or else a view."""
        rows, columns, text = tokens.rows, tokens.columns, conditioning.embeddings_NTD.shape[1]
        embed, options = self.transformer.pos_embed, {"device": self.device, "max_txt_seq_len": text}
        if positions == "canvas":
            return {"rotary": embed([[(1, rows.extent, columns.extent)]], **options)}
        _, prompt = embed([[(1, rows.size, columns.size)]], **options)
        ids = canvas_ids(tokens, positions, self.device, centred=True)
        return {"rotary": (rotations(ids, self.transformer.config.axes_dims_rope, THETA), prompt)}


BACKBONE = QwenImage
