"""The weights of the demo backbones, which `tools/demo_backbone` trains, and of a small CLIP model."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Diffusers folder of `backbone.pretrained: demo`, a UNet."""
TRANSFORMER_WEIGHTS = Path(__file__).parent / "transformer_weights"
"""Diffusers folder of `backbone.pretrained: demo-dit`, a diffusion transformer."""
BACKBONES = {"demo": WEIGHTS, "demo-dit": TRANSFORMER_WEIGHTS}
"""Folders by `backbone.pretrained`."""
CLIP_WEIGHTS = Path(__file__).parent / "clip_weights"
"""Transformers folder of the small CLIP model of `--extractor demo`."""
