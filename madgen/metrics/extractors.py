"""The networks that metrics look through, by role, and which ones `--extractor` means.

| role | of which metrics | values |
|---|---|---|
| `clip` | clip_score, clip_iqa, coherence | `demo`, a CLIP folder or hub id |
| `features` | fid, kid, giqa | `inception`, a file of its weights, `demo`, a CLIP or DINOv2 folder or hub id |
| `vgg` | intra_lpips (VGG16), intra_style (VGG19) | `imagenet`, `random` |
| `dinov2` | fd_dinov2 | a DINOv2 folder or hub id, `none` |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from madgen.utils.errors import UserError

ROLES = ("clip", "features", "vgg", "dinov2")
PRESETS: dict[str, dict[str, str]] = {
    "paper": {
        "clip": "openai/clip-vit-base-patch16",
        "features": "inception",
        "vgg": "imagenet",
        "dinov2": "facebook/dinov2-large",
    },
    "demo": {"clip": "demo", "features": "demo", "vgg": "random", "dinov2": "none"},
}
WAY_OUT = "take another, such as --extractor demo or --extractor "


def parse(text: str) -> dict[str, str]:
    """`paper`, `demo` or a CLIP folder, then `role=value`s, separated by commas: a value for each role."""
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, separator, value = part.partition("=")
        if separator and role not in ROLES:
            raise UserError(f"--extractor {part}: unknown role {role!r}; known: {', '.join(ROLES)}")
        if separator:
            chosen[role] = value
        elif part in PRESETS:
            chosen |= PRESETS[part]
        elif Path(part).expanduser().is_dir():
            chosen |= {**PRESETS["paper"], "clip": part, "features": part, "dinov2": "none"}
        else:
            raise UserError(f"--extractor {part}: neither {', '.join(PRESETS)}, a CLIP folder, nor role=value")
    if missing := [role for role in ROLES if role not in chosen]:
        raise UserError(f"--extractor {text} says nothing of {', '.join(missing)}; begin with paper, demo or a folder")
    if chosen["vgg"] not in ("imagenet", "random"):
        raise UserError(f"--extractor vgg={chosen['vgg']}: must be imagenet or random")
    return chosen


@dataclass(frozen=True)
class Network:
    """A loaded network with what its numbers depend on."""

    kind: str
    label: str
    """For people: who it is, and that it is only the demo's, or untrained."""
    preprocessing: str
    module: Any
    """Whose parameters are the weights."""
    device: torch.device
    net: Any = None
    """What computes, if that is more than the module."""

    @cached_property
    def weights(self) -> str:
        """A hash of all parameters and buffers, wherever they came from."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        """Of the protocol: two networks of one description give the same numbers."""
        return {"network": self.kind, "weights": self.weights, "preprocessing": self.preprocessing}

    def image_features(self, images: list[np.ndarray]) -> Tensor:
        """float32 [N, D]."""
        return self.net.features(images)

    def text_features(self, text: str) -> Tensor:
        """float32 [1, D]; of CLIP alone."""
        return self.net.text_features(text)


class Extractors:
    """The networks of a choice, loaded when they are asked for."""

    def __init__(self, choice: Mapping[str, str], device: torch.device):
        self.choice, self.device = choice, device
        self._loaded: dict[tuple[str, str], Network] = {}

    def __getitem__(self, role: str) -> Network:
        """The network of a metric's `NETWORK`; UserError if it cannot be had."""
        name = self.choice["vgg" if role in ("lpips", "style") else role]
        kind = role if role in ("lpips", "style") else "pictures"
        if (kind, name) not in self._loaded:
            load = {"lpips": self._lpips, "style": self._style}.get(role, self._pictures)
            self._loaded[kind, name] = load(role, name)
        return self._loaded[kind, name]

    def _lpips(self, role: str, name: str) -> Network:
        from madgen.models.perceptual import lpips_network

        net = lpips_network(name == "imagenet", "intra_lpips", WAY_OUT + "...,vgg=random (untrained)").to(self.device)
        label = "LPIPS, VGG16" if name == "imagenet" else "LPIPS over an untrained VGG16"
        return Network("LPIPS over VGG16", label, "crops as they are", net, self.device, net)

    def _style(self, role: str, name: str) -> Network:
        from madgen.models.perceptual import vgg19

        net = vgg19(name == "imagenet", "intra_style", WAY_OUT + "...,vgg=random (untrained)").to(self.device)
        label = "VGG19" if name == "imagenet" else "an untrained VGG19"
        return Network("VGG19", label, "crops as they are, ImageNet's mean and deviation", net, self.device, net)

    def _pictures(self, role: str, name: str) -> Network:
        if name == "none":
            raise UserError(
                f"no network for {role}: add {role}=FOLDER_OR_HUB_ID to --extractor, or leave the metric out"
            )
        if role == "features" and (name == "inception" or name.endswith(".pth")):
            return self._inception(name)
        return self._dinov2(role, name) if role == "dinov2" or _is_dinov2(name) else self._clip(role, name)

    def _inception(self, name: str) -> Network:
        from madgen.models.inception import RESIZE, load

        net = load(None if name == "inception" else Path(name), self.device)
        return Network("InceptionV3, 2048 pool features", "Inception", RESIZE, net.module, self.device, net)

    def _clip(self, role: str, name: str) -> Network:
        from madgen.demo import CLIP_WEIGHTS
        from madgen.models import clip as _clip

        if name == "demo" and not CLIP_WEIGHTS.is_dir():
            raise UserError(f"the demo's CLIP is not in this installation ({CLIP_WEIGHTS}); name another CLIP folder")
        net = _clip.load(str(CLIP_WEIGHTS) if name == "demo" else name, self.device, f"--extractor {role}")
        images = net.processor.image_processor.to_dict()
        told = ("size", "crop_size", "resample", "image_mean", "image_std")
        how = ", ".join(f"{key} {images.get(key)}" for key in told)
        label = "demo CLIP" if name == "demo" else f"CLIP {Path(name).name}"
        return Network("CLIP, projected", label, how, net.model, self.device, net)

    def _dinov2(self, role: str, name: str) -> Network:
        from madgen.models import dinov2 as _dinov2

        net = _dinov2.load(name, self.device, f"--extractor {role}")
        how = f"PIL bicubic to {_dinov2.SIDE} px, ImageNet's mean and deviation"
        return Network("DINOv2, class token", f"DINOv2 {Path(name).name}", how, net.model, self.device, net)


def _is_dinov2(name: str) -> bool:
    config = Path(name).expanduser() / "config.json"
    return "dinov2" in (config.read_text() if config.is_file() else name)
