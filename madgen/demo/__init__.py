"""The packaged toy backbone: its training pictures, its trainer and its weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The diffusers folder that `backbone.pretrained: demo` stands for."""
CLIP_WEIGHTS = Path(__file__).parent / "clip_weights"
"""The transformers folder of the small CLIP that `--extractor demo` stands for."""
