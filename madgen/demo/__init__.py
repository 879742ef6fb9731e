"""The weights of the demo backbone, which `tools/demo_backbone` trains, and of a small CLIP model."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Diffusers folder of `backbone.pretrained: demo`."""
CLIP_WEIGHTS = Path(__file__).parent / "clip_weights"
"""Transformers folder of the small CLIP model of `--extractor demo`."""
