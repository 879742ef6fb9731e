"""Z-Image and Z-Image-Turbo: one stream of image and prompt after separate refiners, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from madgen.backbones import BackboneSpec
from madgen.backbones._conditioning import Conditioning, Embedded
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._sizes import QWEN3_4B
from madgen.backbones._tokens import canvas_ids, rotations
from madgen.backbones._transformer import TransformerBackbone
from madgen.backbones._transformer_family import VIEW_SIZE, activations_of, transformer_size, transformer_spec
from madgen.diffusion.views import Views
from madgen.hub.model_size import Parameters

if TYPE_CHECKING:
    from torch import Tensor

SEQUENCE_MULTIPLE = 32
"""Image and prompt are padded to multiples of this number of tokens."""


class ZImage(TransformerBackbone):
    """Z-Image: hidden states of Qwen3. A guidance scale of 0 is no guidance, as for Z-Image-Turbo."""

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    sequence_length = 512
    max_length = 992
    template_tokens = 3
    text_width_key = "cap_feat_dim"
    pads = True
    text_first = False
    flow = FlowSchedule(linear_sigmas=True)
    widths_alive = 17.0
    assumed_specs = {"": transformer_spec(16, VIEW_SIZE, "cfg", max_side=1024, unguided_scale=0.0)}
    assumed_sizes = {
        "": transformer_size(Parameters(6_154_908_736, 6_153_863_168, 1_853_504), (QWEN3_4B,), 3840, widths_alive)
    }

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        max_side = 2 * min(network["axes_lens"][1:])
        return transformer_spec(network["in_channels"], VIEW_SIZE, "cfg", vae, max_side, unguided_scale=0.0)

    @classmethod
    def activations(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
        return activations_of(network["dim"], cls.widths_alive)

    @staticmethod
    def layer_names(config: Mapping[str, Any]) -> list[str]:
        """Return the attention layers: refiners of the image, then the layers of image and prompt."""
        return [
            *(f"noise_refiner.{i}.attention" for i in range(config["n_refiner_layers"])),
            *(f"layers.{i}.attention" for i in range(config["n_layers"])),
        ]

    @staticmethod
    def separate_layers(config: Mapping[str, Any]) -> list[str]:
        """Return the refiners of the prompt, which never merge."""
        return [f"context_refiner.{i}.attention" for i in range(config["n_refiner_layers"])]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Add the difference of the predictions to the conditional one, as in the Z-Image pipeline."""
        return conditional + scale * (conditional - unconditional)

    def embed(self, prompt: str) -> Embedded:
        """Return Qwen3's last but one hidden states of the tokens of the prompt and its template."""
        (hidden,), _ = self.pipeline.encode_prompt(
            [prompt], self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return Embedded(hidden[None].to(self.dtype))

    def run(self, network: Any, cells_MChw: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        count = len(cells_MChw) // conditioning.paths
        prompts = [
            hidden[:length]
            for hidden, length in zip(conditioning.embeddings_NTD, _lengths(conditioning), strict=True)
            for _ in range(count)
        ]
        images = list(cells_MChw.unsqueeze(2).unbind(0))
        velocity = network(images, (1000 - timestep) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(velocity).squeeze(2)

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the rotations of the canvas for each path; the image begins after the padded prompt."""
        config, ids = self.transformer.config, canvas_ids(tokens, positions, self.device)
        padded = [-(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE for length in _lengths(conditioning)]
        first_P = ids.new_tensor(padded) + 1
        ids_PL3 = torch.cat(
            [first_P[:, None, None].expand(-1, len(ids), 1), ids[:, 1:].expand(len(padded), -1, -1)], -1
        )
        return {"rotary": rotations(ids_PL3, config.axes_dims, config.rope_theta)}


def _lengths(conditioning: Conditioning) -> tuple[int, ...]:
    """Return the number of tokens of each path's prompt."""
    return conditioning.lengths or (conditioning.embeddings_NTD.shape[1],) * conditioning.paths


BACKBONE = ZImage
