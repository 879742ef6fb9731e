"""Control and style pictures of a batch: what ControlNets and IP-Adapters see, and in which steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from madgen.sampling.inputs import PanoramaBatch
from madgen.sampling.method import Method
from madgen.utils.errors import UserError


def canvases(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Resize pictures to the canvas as diffusers does, with Lanczos filters: pixels in 0..1, float32 [B, 3, H, W]."""
    resized = [np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def check_adapters(backbone: Any, batch: PanoramaBatch, method: Method) -> None:
    """Raise UserError for control or style pictures that are missing, have no effect, or do not suit the method."""
    controlled = getattr(backbone, "controlnet", None) is not None
    styled = getattr(backbone, "style_adapter", None) is not None
    for name, argument, pictures, used, adapter, key in (
        ("control", "control_image", batch.control, controlled, "a ControlNet", "backbone.controlnet.weights"),
        ("style", "ip_adapter_image", batch.style, styled, "an IP-Adapter", "backbone.ip_adapter.weights"),
    ):
        if used and pictures is None:
            raise UserError(
                f"the backbone has {adapter}: pass {name}=[picture, ...] to sample, a picture for each panorama, or "
                f"{argument}=picture to sampler(...)"
            )
        if pictures is not None and not used:
            raise UserError(f"{name} has no effect: the backbone has no {adapter.split()[1]}; set {key}")
    method.check_adapters(controlled, styled)
