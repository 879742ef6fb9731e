"""A CLIP model with its processor, for scores; safetensors only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from madgen.hub.model_configs import read_config
from madgen.hub.weights import loading
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

KEY = "scores.clip"


class Clip:
    """CLIP in float32, one image at a time, so that no score depends on the backbone's precision or on other images."""

    def __init__(self, model: Any, processor: Any, device: torch.device):
        self.model, self.processor, self.device = model.to(device).eval(), processor, device
        self.text_features = lru_cache(maxsize=64)(self._text_features)  # shared by all crops of a panorama

    @torch.no_grad()
    def similarity(self, image_HWC: np.ndarray, text: str) -> float:
        """Return the cosine similarity of an RGB image (uint8) and a text, which is truncated to the model's length."""
        return float(torch.nn.functional.cosine_similarity(self.features([image_HWC]), self.text_features(text))[0])

    @torch.no_grad()
    def features(self, images_HWC: Sequence[np.ndarray]) -> Tensor:
        """Return projected features of RGB images (uint8), float32 [N, D], not normalised."""
        copies = [image.copy() for image in images_HWC]
        pixels = self.processor(images=copies, return_tensors="pt", input_data_format="channels_last")
        return self.model.visual_projection(
            self.model.vision_model(pixels.pixel_values.to(self.device, torch.float32)).pooler_output
        )

    @torch.no_grad()
    def _text_features(self, text: str) -> Tensor:
        """Return projected features of a text, float32 [1, D], not normalised."""
        tokens = self.processor(text=[text], truncation=True, return_tensors="pt").to(self.device)
        output = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self.model.text_projection(output.pooler_output)


def load(model: str, device: str | torch.device = "cpu", key: str = KEY) -> Clip:
    """Load a folder or Hub id, the value of `key`; UserError if it contains no CLIP model in safetensors."""
    from transformers import CLIPModel, CLIPProcessor

    where = str(expand_user(model, "scores.clip"))
    config = read_config(where, None, "config.json", key, "CLIP model")
    if config.get("model_type") != "clip" or "CLIPModel" not in (config.get("architectures") or ["CLIPModel"]):
        kind = config.get("architectures") or config.get("model_type")
        raise UserError(f"{key}={model} contains no CLIP model: config.json says {kind}")
    with loading(key, model):
        loaded, found = CLIPModel.from_pretrained(
            where, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        processor = CLIPProcessor.from_pretrained(where)
    if found["missing_keys"]:
        raise UserError(f"{key}={model} lacks weights: {sorted(found['missing_keys'])[0]}")
    return Clip(loaded, processor, torch.device(device))
