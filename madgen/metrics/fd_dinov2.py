"""FD-DINOv2: Fréchet distance of DINOv2 features, closer to human judgement than FID (Stein et al., NeurIPS 2023)."""

from __future__ import annotations

from madgen.metrics.fid import DEFINITION, distance

__all__ = ["DEFINITION", "HIGHER_IS_BETTER", "LABEL", "NETWORK", "SCALE", "distance"]
LABEL, HIGHER_IS_BETTER, SCALE = "FD-DINOv2", False, 1
NETWORK = "dinov2"
