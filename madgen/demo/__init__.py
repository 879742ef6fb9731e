"""The demo backbone: scenes that it was trained on, its tokenizer and its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Diffusers folder of `backbone.pretrained: demo`."""
CLIP_WEIGHTS = Path(__file__).parent / "clip_weights"
"""Transformers folder of the small CLIP model of `--extractor demo`."""
