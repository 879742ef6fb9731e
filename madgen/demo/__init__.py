"""The demo backbone: procedural training images, training scripts and weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Diffusers folder of `backbone.pretrained: demo`."""
CLIP_WEIGHTS = Path(__file__).parent / "clip_weights"
"""Transformers folder of the small CLIP model of `--extractor demo`."""
