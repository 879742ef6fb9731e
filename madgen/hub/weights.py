"""Locate and identify the weights of backbones. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from madgen.hub.content_hash import file_hash, folder_hash
from madgen.hub.repository import FETCH_HINT, cached_commit, cached_file
from madgen.hub.safetensors_file import damaged_file
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
LOADING_FAILURES = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""Errors of diffusers, transformers and safetensors for weights that are damaged, or of another model."""


@contextmanager
def loading(key: str, value: str, *further: type[Exception]) -> Iterator[None]:
    """Convert `LOADING_FAILURES` and `further` errors of weights that are loaded in this context to UserErrors.

    These name the damaged file, or else have the first lines of the error. Only weights of the Hub can be missing from
    its cache, so only for them `madgen fetch` is suggested.
    """
    from huggingface_hub import constants
    from safetensors import SafetensorError

    failures: tuple[type[Exception], ...] = (*LOADING_FAILURES, SafetensorError, *further)
    try:
        yield
    except UserError:
        raise
    except failures as error:
        folder = local_folder(value)
        problem = None if folder is None else damaged_file(folder)
        lines = str(getattr(error, "message", error)).strip().splitlines() or [type(error).__name__]
        reason = problem or (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])
        on_hub = not Path(resolve_pretrained(value)).exists() and problem is None
        hint = FETCH_HINT if on_hub and constants.HF_HUB_OFFLINE else ""
        raise UserError(f"cannot load {key}={value}: {reason}{hint}") from error


def local_folder(where: str, revision: str | None = None) -> Path | None:
    """Return a folder, or the folder of a Hub id in the local cache; None for files and what is not on this machine."""
    folder = Path(resolve_pretrained(where))
    if folder.is_dir():
        return folder
    cached = (cached_file(where, name, revision) for name in ("model_index.json", "config.json"))
    return next((file.parent for file in cached if file is not None), None)


def resolve_pretrained(pretrained: str) -> str:
    """Replace the name of a demo backbone by its folder and expand `~`."""
    from madgen.demo import BACKBONES

    return str(BACKBONES.get(pretrained) or expand_user(pretrained, "backbone.pretrained"))


class ModelFiles(NamedTuple):
    """Location of a backbone, by the keys of `backbone` in a job."""

    pretrained: str
    """Folder, single file or Hub id."""
    revision: str | None = None
    config: str | None = None
    """Folder or Hub id of the config files for a single file."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""

    @classmethod
    def of(
        cls, pretrained: str, revision: str | None = None, config: str | None = None, variant: str | None = None
    ) -> ModelFiles:
        """Return the location with `demo` and `~` resolved."""
        return cls(resolve_pretrained(pretrained), revision, config and resolve_pretrained(config), variant)


def resolve_dtype(dtype: str, device_type: str) -> str:
    """Resolve `auto` to float32 on a CPU and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if device_type == "cpu" else "bfloat16"


def single_file(path: str, key: str = "backbone.pretrained") -> Path | None:
    """Return the path if it is a single weights file. Raises UserError if the file is missing or a pickle."""
    file = expand_user(path, key)
    if file.is_dir() or file.suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES):
        return None
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"{key}={path} is a pickle, which can run code when loaded; convert it to .safetensors")
    if not file.is_file():
        raise UserError(f"{key}={path} does not exist")
    return file


def weights_id(pretrained: str, revision: str | None = None, config: str | None = None) -> str | None:
    """Identify weights by a content hash, or the commit of a Hub id; None if they are not in the cache.

    For a single file, `config` (folder or Hub id) is part of the identity.
    """
    file = single_file(pretrained)
    if file is not None:
        if config is None:
            return file_hash(file)
        config_id = weights_id(config, revision)
        return config_id and f"{file_hash(file)}-{config_id}"
    folder = Path(resolve_pretrained(pretrained))
    if folder.is_dir():
        return folder_hash(folder)
    return cached_commit(pretrained, "model_index.json", revision)


class MissingWeightsError(UserError):
    """Weights are not on this machine."""


def require_local(identity: str | None, name: str) -> str:
    """Return an identity, such as that of `weights_id`. Raises MissingWeightsError if it is None."""
    if identity is None:
        raise MissingWeightsError(f"{name} is not in the local Hub cache{FETCH_HINT}")
    return identity
