"""Feature extractors of the metrics, by role, as chosen with `--extractor`.

| role | metrics | values |
|---|---|---|
| `clip` | clip_score, clip_iqa, coherence | `demo`, a CLIP folder or hub id |
| `features` | fid, kid, giqa | `inception`, a file with its weights, `demo`, a CLIP or DINOv2 folder or hub id |
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

import torch

from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

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
UNTRAINED = "use an untrained network: --extractor ...,vgg=random"


def parse(text: str) -> dict[str, str]:
    """Parse `paper`, `demo` or a CLIP folder, followed by comma-separated `role=value`s, to a value for each role."""
    choice: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, separator, value = part.partition("=")
        if separator and role not in ROLES:
            raise UserError(f"--extractor {part}: unknown role {role!r}; known: {', '.join(ROLES)}")
        if separator:
            choice[role] = value
        elif part in PRESETS:
            choice |= PRESETS[part]
        elif expand_user(part, "--extractor").is_dir():
            choice |= {**PRESETS["paper"], "clip": part, "features": part, "dinov2": "none"}
        else:
            raise UserError(f"--extractor {part}: neither {', '.join(PRESETS)}, a CLIP folder, nor role=value")
    if missing := [role for role in ROLES if role not in choice]:
        raise UserError(
            f"--extractor {text}: no network for {', '.join(missing)}; start with paper, demo or a CLIP folder"
        )
    if choice["vgg"] not in ("imagenet", "random"):
        raise UserError(f"--extractor vgg={choice['vgg']}: must be imagenet or random")
    return choice


@dataclass(frozen=True)
class Network:
    """A loaded network and everything its features depend on."""

    kind: str
    label: str
    """Name for reports; mentions if it is the demo's or untrained."""
    preprocessing: str
    module: Any
    """Holds the weights."""
    device: torch.device
    net: Any
    """Computes features; may wrap the module: `features(images)` [N, D], of CLIP also `text_features(text)` [1, D]."""

    @cached_property
    def weights(self) -> str:
        """Hash of all parameters and buffers, independent of their source."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        """Return its part of the protocol: networks with the same description compute the same features."""
        return {"network": self.kind, "weights": self.weights, "preprocessing": self.preprocessing}


class Extractors:
    """Load the networks of an `--extractor` choice on first use."""

    def __init__(self, choice: Mapping[str, str], device: torch.device):
        self.choice, self.device = choice, device
        self._loaded: dict[tuple[str, str], Network] = {}

    def __getitem__(self, role: str) -> Network:
        """Return the network of a metric's `NETWORK` role; raise UserError if it is not available."""
        name = self.choice["vgg" if role in ("lpips", "style") else role]
        kind = role if role in ("lpips", "style") else "image"  # metrics with the same image network share it
        if (kind, name) not in self._loaded:
            load = {"lpips": self._lpips, "style": self._style}.get(role, self._image_network)
            self._loaded[kind, name] = load(role, name)
        return self._loaded[kind, name]

    def _lpips(self, role: str, name: str) -> Network:
        from madgen.models.perceptual import lpips_network

        net = lpips_network(name == "imagenet", "intra_lpips", UNTRAINED).to(self.device)
        label = "LPIPS, VGG16" if name == "imagenet" else "LPIPS over an untrained VGG16"
        return Network("LPIPS over VGG16", label, "crops as they are", net, self.device, net)

    def _style(self, role: str, name: str) -> Network:
        from madgen.models.perceptual import vgg19

        net = vgg19(name == "imagenet", "intra_style", UNTRAINED).to(self.device)
        label = "VGG19" if name == "imagenet" else "an untrained VGG19"
        return Network("VGG19", label, "crops as they are, ImageNet's mean and deviation", net, self.device, net)

    def _image_network(self, role: str, name: str) -> Network:
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
        from madgen.models import clip

        if name == "demo" and not CLIP_WEIGHTS.is_dir():
            raise UserError(f"this installation lacks the demo's CLIP ({CLIP_WEIGHTS}); name another CLIP folder")
        net = clip.load(str(CLIP_WEIGHTS) if name == "demo" else name, self.device, f"--extractor {role}")
        config = net.processor.image_processor.to_dict()
        settings = ("size", "crop_size", "resample", "image_mean", "image_std")
        preprocessing = ", ".join(f"{key} {config.get(key)}" for key in settings)
        label = "demo CLIP" if name == "demo" else f"CLIP {Path(name).name}"
        return Network("CLIP, projected", label, preprocessing, net.model, self.device, net)

    def _dinov2(self, role: str, name: str) -> Network:
        from madgen.models import dinov2

        net = dinov2.load(name, self.device, f"--extractor {role}")
        preprocessing = f"PIL bicubic to {dinov2.SIDE} px, ImageNet's mean and deviation"
        return Network("DINOv2, class token", f"DINOv2 {Path(name).name}", preprocessing, net.model, self.device, net)


def _is_dinov2(name: str) -> bool:
    config = expand_user(name, "--extractor") / "config.json"
    return "dinov2" in (config.read_text(encoding="utf-8") if config.is_file() else name)
