"""Where a backbone's weights lie, what they are, and in which precision they run. Knows no framework."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from madgen.errors import UserError


def resolve_pretrained(pretrained: str) -> str:
    """The folder that `demo` stands for; anything else as it is."""
    from madgen.demo import WEIGHTS

    return str(WEIGHTS) if pretrained == "demo" else str(Path(pretrained).expanduser())


def resolve_dtype(dtype: str, device_type: str) -> str:
    """`auto` is float32 on a CPU and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if device_type == "cpu" else "bfloat16"


def weights_id(pretrained: str, revision: str | None = None) -> str | None:
    """Tells weights from others: a folder's content hash, or the commit of a hub id; None if it is not in the cache."""
    folder = Path(resolve_pretrained(pretrained))
    if folder.is_dir():
        return _folder_hash(folder)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(pretrained, "model_index.json", revision=revision)
    return f"commit-{Path(cached).parent.name}" if isinstance(cached, str) else None


def require_weights_id(pretrained: str, revision: str | None = None) -> str:
    """`weights_id`, or UserError where the weights are not at hand."""
    found = weights_id(pretrained, revision)
    if found is None:
        raise UserError(f"the weights of backbone.pretrained={pretrained} are not in the local hub cache")
    return found


@lru_cache
def _folder_hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
