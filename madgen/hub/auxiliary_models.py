"""Locate, identify and download safety checkers and CLIP models."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from madgen.hub.content_hash import folder_hash
from madgen.hub.repository import cached_commit, download, hub_file, identify
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

CHECKER_PARTS = ("safety_checker", "feature_extractor")
"""Folders of a pipeline."""


def in_pipeline_layout(checker: str) -> bool:
    """Return whether a safety checker's folder or Hub id is a whole pipeline, with the checker in a subfolder."""
    folder, config = expand_user(checker, "safety.checker"), f"{CHECKER_PARTS[0]}/config.json"
    if folder.is_dir():
        return (folder / CHECKER_PARTS[0]).is_dir()
    if cached_commit(checker, config) is None and cached_commit(checker, "config.json") is None:
        with suppress(UserError):
            hub_file(checker, config, None, "safety.checker")
    return cached_commit(checker, config) is not None


def checker_id(checker: str) -> str | None:
    """Identify a safety checker by a content hash, or the commit of a Hub id; None if it is not in the cache."""
    folder = expand_user(checker, "safety.checker")
    if folder.is_dir() and in_pipeline_layout(checker):
        return "-".join(folder_hash(folder / part) for part in CHECKER_PARTS)
    return identify(checker, "safety.checker") or cached_commit(checker, f"{CHECKER_PARTS[0]}/config.json")


def download_checker(checker: str) -> list[Path]:
    """Download a safety checker; return its folder in the Hub cache, nothing for a local folder."""
    folders = [f"{part}/" for part in CHECKER_PARTS] if in_pipeline_layout(checker) else [""]
    parts = [f"{folder}*.{suffix}" for folder in folders for suffix in ("json", "safetensors")]
    return download(checker, parts, "safety.checker")


def clip_id(model: str) -> str | None:
    """Identify a CLIP model by a content hash, or the commit of a Hub id; None if it is not in the cache."""
    return identify(model, "scores.clip")


def download_clip(model: str) -> list[Path]:
    """Download a CLIP model; return its folder in the Hub cache, nothing for a local folder."""
    return download(model, ["*.json", "merges.txt", "*.safetensors"], "scores.clip")
