"""The packaged toy backbone: its training pictures, its trainer and its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The diffusers folder that `backbone.pretrained: demo` stands for."""
CLIP_WEIGHTS = Path(__file__).parent / "clip"
"""A small CLIP of the same pictures, in the transformers layout: it scores what the backbone draws."""
