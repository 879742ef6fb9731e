"""Image features of DINOv2, for FD-DINOv2; safetensors only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from madgen.hub.model_configs import read_config
from madgen.hub.weights import loading
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class DinoV2:
    """The class token after the last norm, of images resized to 224x224 px, as in dgm-eval (Stein et al., 2023)."""

    def __init__(self, model: Any, device: torch.device):
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def features(self, images: list[np.ndarray]) -> Tensor:
        """Return features of RGB images (uint8), float32 [N, D]."""
        small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]
        pixels_NHWC = torch.from_numpy(np.stack([np.asarray(image) for image in small])).float() / 255
        seen = ((pixels_NHWC - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        return self.model(pixel_values=seen.to(self.device)).pooler_output


def load(model: str, device: str | torch.device, key: str) -> DinoV2:
    """Load a folder or Hub id, the value of `key`; UserError if it contains no DINOv2 in safetensors."""
    from transformers import Dinov2Model

    where = str(expand_user(model, "--extractor"))
    config = read_config(where, None, "config.json", key, "DINOv2 model")
    if config.get("model_type") != "dinov2":
        raise UserError(f"{key}={model} contains no DINOv2 model: config.json says {config.get('model_type')}")
    with loading(key, model):
        loaded = Dinov2Model.from_pretrained(where, use_safetensors=True, dtype=torch.float32)
    return DinoV2(loaded, torch.device(device))
