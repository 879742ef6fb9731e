"""diffusers' safety checker for Stable Diffusion, with its feature extractor; safetensors only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from madgen.hub.auxiliary_models import CHECKER_PARTS, in_pipeline_layout
from madgen.hub.model_configs import read_config
from madgen.hub.weights import loading
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

CLASS = "StableDiffusionSafetyChecker"
KEY = "safety.checker"


class SafetyChecker:
    """The checker in float32, one image at a time: no result depends on the backbone's precision or other images."""

    def __init__(self, model: Any, extractor: Any, device: torch.device):
        self.model, self.extractor, self.device = model.to(device).eval(), extractor, device

    @torch.no_grad()
    def flags(self, image_HWC: np.ndarray) -> bool:
        """Return whether the checker flags an RGB image (uint8)."""
        pixels = self.extractor(image_HWC.copy(), return_tensors="pt", input_data_format="channels_last").pixel_values
        # The checker blackens flagged images that are passed with the features: pass a placeholder.
        _, flagged = self.model(clip_input=pixels.to(self.device, torch.float32), images=[np.zeros(1)])
        return bool(flagged[0])


def load(checker: str, device: str | torch.device = "cpu") -> SafetyChecker:
    """Load a folder or Hub id of a checker, or of a pipeline that has one; UserError if there is none."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    where = str(expand_user(checker, "safety.checker"))
    of_checker, of_extractor = CHECKER_PARTS if in_pipeline_layout(checker) else ("", "")
    config = read_config(where, None, f"{of_checker}/config.json".lstrip("/"), KEY, "safety checker")
    if CLASS not in (config.get("architectures") or ()):
        raise UserError(
            f"{KEY}={checker} contains no safety checker: its architectures are {config.get('architectures')}"
        )
    read_config(where, None, f"{of_extractor}/preprocessor_config.json".lstrip("/"), KEY, "safety checker")
    with loading(KEY, checker):
        model, found = StableDiffusionSafetyChecker.from_pretrained(
            where, subfolder=of_checker, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        extractor = CLIPImageProcessor.from_pretrained(where, subfolder=of_extractor)
    if found["missing_keys"]:
        raise UserError(f"{KEY}={checker} lacks weights: {sorted(found['missing_keys'])[0]}")
    return SafetyChecker(model, extractor, torch.device(device))
