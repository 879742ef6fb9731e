"""Silence the messages of libraries. Does not import Lightning."""

from __future__ import annotations

import logging
import warnings

from madgen import backbones


def quieten() -> None:
    """Silence warnings of libraries that the user cannot act on."""
    warnings.filterwarnings("ignore", module=r"(lightning|torch|triton|diffusers|transformers|huggingface_hub)\b.*")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    backbones.silence_model_libraries()
