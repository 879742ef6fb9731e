"""IP-Adapters: cross-attention to a picture's style and content, beside that to the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from madgen.diffusion.attention import KeysValues, by_head
from madgen.hub.adapters import IpAdapterFiles
from madgen.hub.weights import loading
from madgen.utils.errors import UserError

KEY = "backbone.ip_adapter.weights"


@dataclass(frozen=True)
class StyleAdapter:
    """The networks of an IP-Adapter."""

    image_encoder: Any
    processor: Any
    """Converts pictures to the encoder's pixels."""
    projection: Any
    """From the encoder's output to tokens."""
    keys_values: Mapping[str, tuple[torch.nn.Module, torch.nn.Module]]
    """Projections of the tokens to keys and to values for each cross-attention layer, by its name."""

    @property
    def models(self) -> list[torch.nn.Module]:
        """Return all networks."""
        return [self.image_encoder, self.projection, *chain.from_iterable(self.keys_values.values())]

    def tokens(self, pictures: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of pictures (PIL) [P, T, D], and those of no picture [1, T, D]."""
        from diffusers.models.embeddings import ImageProjection

        weights = next(self.image_encoder.parameters())
        pixels = self.processor(list(pictures), return_tensors="pt").pixel_values.to(weights.device, weights.dtype)
        if isinstance(self.projection, ImageProjection):
            embeddings = self.image_encoder(pixels).image_embeds
            nothing = torch.zeros_like(embeddings[:1])
        else:
            embeddings, nothing = (
                self.image_encoder(each, output_hidden_states=True).hidden_states[-2]
                for each in (pixels, torch.zeros_like(pixels[:1]))
            )
        return self.projection(embeddings), self.projection(nothing)

    def project(self, tokens_NTD: torch.Tensor, attention: Mapping[str, Any]) -> dict[str, KeysValues]:
        """Project tokens to keys and values for each cross-attention layer."""
        return {
            name: (by_head(attention[name], to_k(tokens_NTD)), by_head(attention[name], to_v(tokens_NTD)))
            for name, (to_k, to_v) in self.keys_values.items()
        }


def load_style_adapter(
    pipeline: Any, attention: Mapping[str, Any], files: IpAdapterFiles, dtype: torch.dtype
) -> StyleAdapter:
    """Load an IP-Adapter by diffusers and take it out of the pipeline; the layers keep their processors.

    Raises UserError if it cannot be loaded, or does not fit the UNet.
    """
    unet, processors = pipeline.unet, {name: layer.processor for name, layer in attention.items()}
    from diffusers.models.attention_processor import AttnProcessor2_0
    from transformers import CLIPVisionModelWithProjection

    try:
        with loading(KEY, files.weights):
            unet.set_attn_processor(AttnProcessor2_0())
            image_encoder = CLIPVisionModelWithProjection.from_pretrained(
                files.source, subfolder=files.image_encoder, use_safetensors=True, dtype=dtype
            )
            pipeline.register_modules(image_encoder=image_encoder)
            pipeline.load_ip_adapter(
                files.source, subfolder=files.subfolder, weight_name=files.weight_name, image_encoder_folder=None
            )
            return _taken_out(pipeline)
    finally:
        pipeline.unload_ip_adapter()
        for name, layer in attention.items():
            layer.processor = processors[name]


def _taken_out(pipeline: Any) -> StyleAdapter:
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    if "FaceID" in type(projection).__name__:
        raise UserError(
            f"{KEY}: FaceID adapters take embeddings of faces, not pictures, and are not supported; use a plain or "
            "plus IP-Adapter, such as ip-adapter-plus-face_sd15.safetensors"
        )
    keys_values = {
        name: (processor.to_k_ip[0], processor.to_v_ip[0])
        for name, processor in pipeline.unet.attn_processors.items()
        if hasattr(processor, "to_k_ip")
    }
    return StyleAdapter(pipeline.image_encoder, pipeline.feature_extractor, projection, keys_values)
