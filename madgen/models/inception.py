"""Inception for FID: TensorFlow's network and weights, ported by torch-fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from madgen.utils.errors import UserError

RESIZE = "299 px, bilinear as in TensorFlow 1 (torch-fidelity)"
FEATURES = "2048"


class Inception:
    """The 2048 features after the last pooling."""

    def __init__(self, module: Any, device: torch.device):
        self.module, self.device = module.to(device), device

    @torch.no_grad()
    def features(self, images: list[np.ndarray]) -> Tensor:
        """Return features of RGB images (uint8), float32 [N, 2048]."""
        return self.module(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device))[0].flatten(1)


def load(weights: Path | None, device: torch.device) -> Inception:
    """Load weights from a file, or from torch's download cache; UserError if they are not available."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("Inception needs torch-fidelity: pip install 'madgen[eval]'") from error
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if weights is None and not path.is_file():
        _download(URL_INCEPTION_V3, path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        module = FeatureExtractorInceptionV3("inception", [FEATURES], feature_extractor_weights_path=str(path))
    except (OSError, RuntimeError, torch.serialization.pickle.UnpicklingError) as error:
        raise UserError(
            f"--extractor features={path} contains no Inception weights: {str(error).splitlines()[0]}"
        ) from error
    return Inception(module, device)


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (URLError, OSError) as error:
        raise UserError(
            f"FID, KID and GIQA need Inception's weights, which cannot be downloaded ({error}); put {url} "
            f"into {path.parent}, or use another network, such as --extractor demo"
        ) from error
