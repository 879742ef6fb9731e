"""Locate, identify and download model files. Imports no framework."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from madgen.hub.safetensors_file import damaged_file, read_header
from madgen.utils.errors import UserError
from madgen.utils.node_cache import once
from madgen.utils.validation import expand_user

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
CHECKER_PARTS = ("safety_checker", "feature_extractor")  # folders of a pipeline
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers uses

FETCH_HINT = "; run `madgen fetch JOB.yaml` on a machine with a network, such as a login node, to download it"


def offline_hint() -> str:
    """Return the hint to run `madgen fetch` if the Hub is offline."""
    from huggingface_hub import constants

    return FETCH_HINT if constants.HF_HUB_OFFLINE else ""


LOADING_FAILURES = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""What diffusers, transformers and safetensors raise for weights that are damaged, or of another model."""


def load_error(key: str, value: str, error: Exception) -> UserError:
    """Return the error that weights cannot be loaded: what a damaged file is, or else the first lines of `error`.

    Only weights of the Hub can be missing from its cache, so only for them `madgen fetch` is suggested.
    """
    folder = local_folder(value)
    problem = None if folder is None else damaged_file(folder)
    lines = str(getattr(error, "message", error)).strip().splitlines() or [type(error).__name__]
    reason = problem or (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])
    on_hub = not Path(resolve_pretrained(value)).exists() and problem is None
    return UserError(f"cannot load {key}={value}: {reason}{offline_hint() if on_hub else ''}")


def local_folder(where: str) -> Path | None:
    """Return a folder, or the folder of a Hub id in the local cache; None for files and what is not on this machine."""
    folder = Path(resolve_pretrained(where))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("model_index.json", "config.json"):
        with suppress(HFValidationError):
            if isinstance(cached := try_to_load_from_cache(where, name), str):
                return Path(cached).parent
    return None


def resolve_pretrained(pretrained: str) -> str:
    """Replace `demo` by its folder and expand `~`."""
    from madgen.demo import WEIGHTS

    return str(WEIGHTS) if pretrained == "demo" else str(expand_user(pretrained, "backbone.pretrained"))


class ModelFiles(NamedTuple):
    """Location of a backbone, with `demo` and `~` resolved."""

    pretrained: str
    """Folder, single file or Hub id."""
    revision: str | None
    config: str | None
    """Folder or Hub id of the config files for a single file."""

    @classmethod
    def of(cls, pretrained: str, revision: str | None = None, config: str | None = None) -> ModelFiles:
        """Resolve the keys of `backbone`."""
        return cls(resolve_pretrained(pretrained), revision, config and resolve_pretrained(config))


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
        config_id = None if config is None else weights_id(config, revision)
        parts = (_file_hash(file, file.stat().st_mtime_ns), config_id)
        return None if config is not None and config_id is None else "-".join(part for part in parts if part)
    folder = Path(resolve_pretrained(pretrained))
    if folder.is_dir():
        return _folder_hash(folder)
    return _commit(pretrained, "model_index.json", revision)


def require_local(identity: str | None, name: str) -> str:
    """Return an identity, such as that of `weights_id`. Raises UserError if it is None: not on this machine."""
    if identity is None:
        raise UserError(f"{name} is not in the local Hub cache{FETCH_HINT}")
    return identity


def check_lora(weights: str) -> None:
    """Raise UserError if a LoRA does not exist or is no complete safetensors file, unless it is still on the Hub."""
    file = lora_file(weights)
    if file is not None:
        read_header(file, f"the LoRA {weights}")


def lora_file(weights: str, download: bool = False) -> Path | None:
    """Return the file of a LoRA; None if it is not in the Hub cache. Raises UserError for an invalid path."""
    file = single_file(weights, "backbone.loras: weights")
    if file is not None:
        return file
    folder = expand_user(weights, "backbone.loras: weights")
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        candidates = [path for path in files if path.name == LORA_FILE] or files
        if len(candidates) != 1:
            raise UserError(
                f"backbone.loras: folder {weights} contains {len(candidates)} .safetensors files; give the path of one"
            )
        return candidates[0]
    check_hub_id(weights, "backbone.loras: weights")
    if download:
        return hub_file(weights, LORA_FILE, None, "backbone.loras: weights")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(weights, LORA_FILE)
    return Path(cached) if isinstance(cached, str) else None


def lora_id(weights: str) -> str | None:
    """Return the content hash of a LoRA; None if it is not in the Hub cache."""
    file = lora_file(weights)
    return None if file is None else _file_hash(file, file.stat().st_mtime_ns)


CONTROLNET_FILES = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-0*.safetensors")


def controlnet_id(weights: str) -> str | None:
    """Identify a ControlNet by a content hash, or the commit of a Hub id; None if it is not in the cache.

    Raises UserError for an invalid path, or a file that is not complete.
    """
    key = "backbone.controlnet.weights"
    file = single_file(weights, key)
    if file is not None:
        read_header(file, f"{key}={weights}")
        return _file_hash(file, file.stat().st_mtime_ns)
    folder = expand_user(weights, key)
    if folder.is_dir():
        return _folder_hash(folder)
    check_hub_id(weights, key)
    return _commit(weights, "config.json", None)


def download_controlnet(weights: str) -> list[Path]:
    """Download a ControlNet; return its folder in the Hub cache, nothing for local files."""
    key = "backbone.controlnet.weights"
    if expand_user(weights, key).exists():
        return []
    check_hub_id(weights, key)
    return [_snapshot(weights, [*CONTROLNET_FILES, "diffusion_pytorch_model.safetensors.index.json"], key)]


IP_ADAPTER = "backbone.ip_adapter.weights"


class IpAdapterFiles(NamedTuple):
    """Location of an IP-Adapter."""

    weights: str
    """`backbone.ip_adapter.weights` of the job."""
    source: str
    """Folder or Hub id."""
    subfolder: str
    weight_name: str
    """Name of the `.safetensors` file in `subfolder`."""
    image_encoder: str
    """Path of the image encoder's folder in `source`."""


def ip_adapter_files(config: Any) -> IpAdapterFiles | None:
    """Locate the files of an `IpAdapterConfig`; None without weights. Raises UserError if a local file is missing."""
    key, weights, subfolder, weight_name = IP_ADAPTER, config.weights, config.subfolder, config.weight_name
    if weights is None:
        return None
    file = single_file(weights, key)
    if file is not None:
        if subfolder or weight_name is not None:
            raise UserError(f"{key}={weights} is a file: leave subfolder and weight_name of backbone.ip_adapter unset")
        folder, weight_name = file.parent, file.name
    else:
        folder = expand_user(weights, key)
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise UserError(f"backbone.ip_adapter.weight_name={weight_name} must be a .safetensors file")
    named = config.image_encoder
    encoder = named if "/" in named else "/".join(filter(None, (subfolder, named)))
    if folder.is_dir():
        name = weight_name or _only_weights(folder / subfolder)
        for path in (folder / subfolder / name, folder / encoder / "config.json"):
            if not path.is_file():
                raise UserError(f"{key}: {path} does not exist; see backbone.ip_adapter for where it is looked up")
        read_header(folder / subfolder / name, f"{key}={folder / subfolder / name}")
        return IpAdapterFiles(weights, str(folder), subfolder, name, encoder)
    check_hub_id(weights, key)
    if weight_name is None:
        raise UserError(
            f"{key}={weights} is a Hub id: name its file by backbone.ip_adapter.weight_name, such as "
            "ip-adapter_sd15.safetensors, and its folder by backbone.ip_adapter.subfolder"
        )
    return IpAdapterFiles(weights, weights, subfolder, weight_name, encoder)


def _only_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) != 1:
        raise UserError(
            f"{IP_ADAPTER}: folder {folder} contains {len(names)} .safetensors files; name one by "
            "backbone.ip_adapter.subfolder and weight_name"
        )
    return names[0]


def ip_adapter_id(files: IpAdapterFiles) -> str | None:
    """Identify an IP-Adapter and its image encoder by content hashes, or a Hub commit; None if not in the cache."""
    folder = Path(files.source)
    if folder.is_dir():
        file = folder / files.subfolder / files.weight_name
        return f"{_file_hash(file, file.stat().st_mtime_ns)}-{_folder_hash(folder / files.image_encoder)}"
    return _commit(files.source, "/".join(filter(None, (files.subfolder, files.weight_name))), None)


def download_ip_adapter(files: IpAdapterFiles) -> list[Path]:
    """Download an IP-Adapter; return its folder in the Hub cache, nothing for a local folder."""
    if Path(files.source).is_dir():
        return []
    encoder = [f"{files.image_encoder}/{name}" for name in ("config.json", "model.safetensors")]
    adapter = "/".join(filter(None, (files.subfolder, files.weight_name)))
    return [_snapshot(files.source, [adapter, *encoder], IP_ADAPTER)]


def in_pipeline_layout(checker: str) -> bool:
    """Return whether a safety checker's folder or Hub id is a whole pipeline, with the checker in a subfolder."""
    folder, config = expand_user(checker, "safety.checker"), f"{CHECKER_PARTS[0]}/config.json"
    if folder.is_dir():
        return (folder / CHECKER_PARTS[0]).is_dir()
    if _commit(checker, config, None) is None and _commit(checker, "config.json", None) is None:
        try:
            hub_file(checker, config, None, "safety.checker")
        except UserError:
            return False
    return _commit(checker, config, None) is not None


def download_checker(checker: str) -> list[Path]:
    """Download a safety checker; return its folder in the Hub cache, nothing for a local folder."""
    if expand_user(checker, "safety.checker").is_dir():
        return []
    folders = [f"{part}/" for part in CHECKER_PARTS] if in_pipeline_layout(checker) else [""]
    parts = [f"{folder}*.{suffix}" for folder in folders for suffix in ("json", "safetensors")]
    return [_snapshot(checker, parts, "safety.checker")]


def _snapshot(repository: str, patterns: list[str], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"cannot download {key}={repository}: {str(error).strip().splitlines()[0]}") from error


def download_clip(model: str) -> list[Path]:
    """Download a CLIP model; return its folder in the Hub cache, nothing for a local folder."""
    if expand_user(model, "scores.clip").is_dir():
        return []
    check_hub_id(model, "scores.clip")
    return [_snapshot(model, ["*.json", "merges.txt", "*.safetensors"], "scores.clip")]


def clip_id(model: str) -> str | None:
    """Identify a CLIP model by a content hash, or the commit of a Hub id; None if it is not in the cache."""
    folder = expand_user(model, "scores.clip")
    if folder.is_dir():
        return _folder_hash(folder)
    check_hub_id(model, "scores.clip")
    return _commit(model, "config.json", None)


def checker_id(checker: str) -> str | None:
    """Identify a safety checker by a content hash, or the commit of a Hub id; None if it is not in the cache."""
    folder = expand_user(checker, "safety.checker")
    if folder.is_dir():
        parts = [folder / part for part in CHECKER_PARTS] if in_pipeline_layout(checker) else [folder]
        return "-".join(_folder_hash(part) for part in parts)
    check_hub_id(checker, "safety.checker")
    return _commit(checker, f"{CHECKER_PARTS[0]}/config.json", None) or _commit(checker, "config.json", None)


_no_retries = ContextVar("no_retries", default=False)


@contextmanager
def without_retries() -> Iterator[None]:
    """Within this context, files that are not in the cache are missing at once if the Hub cannot be reached."""
    token = _no_retries.set(True)
    try:
        yield
    finally:
        _no_retries.reset(token)


@lru_cache
def _reachable(endpoint: str) -> bool:
    """Return whether the Hub accepts connections, or a proxy is configured; checked once per process."""
    url = urlsplit(endpoint)
    if urllib.request.getproxies().get(url.scheme):
        return True
    try:
        with socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), 3):
            return True
    except OSError:
        return False


def hub_file(repository: str, name: str, revision: str | None, key: str = "backbone.pretrained") -> Path:
    """Return a file of a Hub id, downloaded if necessary. Raises UserError if it is not available."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # each retry without a network prints two lines
    check_hub_id(repository, key)
    missing = f"{key}={repository!r} is neither a folder, {_or_demo(key)}nor a model"
    cached_only = _no_retries.get() and not _reachable(constants.ENDPOINT)  # the library retries for 23 s
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=cached_only))
    except LocalEntryNotFoundError as error:
        raise UserError(f"{missing} in the local Hub cache, and the Hub is not reachable{FETCH_HINT}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{missing} on the Hub: {str(error).strip().splitlines()[0]}") from error


def check_hub_id(name: str, key: str = "backbone.pretrained") -> None:
    """Raise UserError if `name` is not a valid repository name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        raise UserError(f"{key}={name!r} is neither a folder, {_or_demo(key)}nor a Hub id (owner/name)")


def _or_demo(key: str) -> str:
    return "nor 'demo', " if key.startswith("backbone.") else ""


def _commit(repository: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name, revision=revision)
    return f"commit-{Path(cached).parent.name}" if isinstance(cached, str) else None


@lru_cache
def _file_hash(file: Path, mtime_ns: int) -> str:
    """Hash a file, cached per node by its modification time."""

    def read(stream: BufferedReader) -> str:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    return once(file, "blake2b, 16 bytes", read)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, those of linked folders too; a link to a folder that contains it is not followed."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        above = [Path(parent).resolve(), *Path(parent).resolve().parents]
        folders[:] = [name for name in folders if Path(parent, name).resolve() not in above]
        yield from (Path(parent, name) for name in files)


@lru_cache
def _folder_hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_files_below(folder)):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            content = once(path, "sha256", lambda stream: hashlib.file_digest(stream, "sha256").hexdigest())
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
