"""Where a backbone's weights lie, what they are, and in which precision they run. Knows no framework."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from madgen.utils.errors import UserError
from madgen.utils.node_cache import once
from madgen.utils.validation import expand_user

PICKLED = (".ckpt", ".bin", ".pt", ".pth")
CHECKER_PARTS = ("safety_checker", "feature_extractor")  # folders of a pipeline
LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers calls it in a folder or on the hub

FETCH_IT = "; where there is a network (a login node), `madgen fetch JOB.yaml` downloads what a job needs"


def offline_hint() -> str:
    """The way out where something is missing that the hub may not be asked for."""
    from huggingface_hub import constants

    return FETCH_IT if constants.HF_HUB_OFFLINE else ""


def resolve_pretrained(pretrained: str) -> str:
    """The folder that `demo` stands for; anything else as it is."""
    from madgen.demo import WEIGHTS

    return str(WEIGHTS) if pretrained == "demo" else str(expand_user(pretrained, "backbone.pretrained"))


class ModelFiles(NamedTuple):
    """Location of a backbone, with `demo` and `~` resolved."""

    pretrained: str
    """Folder, single file or hub id."""
    revision: str | None
    config: str | None
    """Folder or hub id of the config files that go with a single file."""

    @classmethod
    def of(cls, pretrained: str, revision: str | None = None, config: str | None = None) -> ModelFiles:
        """Resolve the keys of `backbone`."""
        return cls(resolve_pretrained(pretrained), revision, config and resolve_pretrained(config))


def resolve_dtype(dtype: str, device_type: str) -> str:
    """`auto` is float32 on a CPU and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if device_type == "cpu" else "bfloat16"


def single_file(path: str, key: str = "backbone.pretrained") -> Path | None:
    """The path if it names one file of weights; UserError if that is not there, or would have to be unpickled."""
    file = expand_user(path, key)
    if file.is_dir() or file.suffix.lower() not in (".safetensors", *PICKLED):
        return None
    if file.suffix.lower() in PICKLED:
        raise UserError(f"{key}={path} is a pickle, which can run code when it is read; convert it to .safetensors")
    if not file.is_file():
        raise UserError(f"{key}={path} does not exist")
    return file


def weights_id(pretrained: str, revision: str | None = None, config: str | None = None) -> str | None:
    """Tells weights from others: a content hash, or the commit of a hub id; None if it is not in the cache.

    Of a single file with a `config` (folder or hub id), both count.
    """
    file = single_file(pretrained)
    if file is not None:
        described = None if config is None else weights_id(config, revision)
        parts = (_file_hash(file, file.stat().st_mtime_ns), described)
        return None if config is not None and described is None else "-".join(part for part in parts if part)
    folder = Path(resolve_pretrained(pretrained))
    if folder.is_dir():
        return _folder_hash(folder)
    return _commit(pretrained, "model_index.json", revision)


def require_weights_id(pretrained: str, revision: str | None = None, config: str | None = None) -> str:
    """`weights_id`, or UserError where the weights are not at hand."""
    found = weights_id(pretrained, revision, config)
    if found is None:
        missing = f"the files of backbone.config={config}" if config else f"the weights of {pretrained}"
        raise UserError(f"{missing} are not in the local hub cache (backbone.pretrained={pretrained}){FETCH_IT}")
    return found


def weight_files(pretrained: str, revision: str | None, variant: str | None) -> list[Path]:
    """The files that loading a backbone reads, of a folder or of the hub cache; none that would be downloaded."""
    if (file := single_file(pretrained)) is not None:
        return [file]
    index = Path(resolve_pretrained(pretrained)) / "model_index.json"
    if not index.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(pretrained, index.name, revision=revision)
        if not isinstance(cached, str):
            return []
        index = Path(cached)
    try:
        parts = [
            name for name, of in json.loads(index.read_text(encoding="utf-8")).items() if isinstance(of, list) and of[0]
        ]
    except ValueError:  # told where it is loaded
        return []
    found: list[Path] = []
    for part in sorted(set(parts) - set(CHECKER_PARTS)):
        files = sorted((index.parent / part).glob("*.safetensors"))
        plain = [path for path in files if path.name.count(".") == 1]
        found += [path for path in files if variant and re.search(rf"\.{re.escape(variant)}[.-]", path.name)] or plain
    return found


def lora_file(weights: str, download: bool = False) -> Path | None:
    """The `.safetensors` file of a LoRA; None if it is on the hub and not in the cache. UserError if there is none."""
    file = single_file(weights, "backbone.loras: weights")
    if file is not None:
        return file
    folder = expand_user(weights, "backbone.loras: weights")
    if folder.is_dir():
        found = sorted(folder.glob("*.safetensors"))
        named = [path for path in found if path.name == LORA_FILE] or found
        if len(named) != 1:
            raise UserError(
                f"backbone.loras: the folder {weights} holds {len(named)} .safetensors files; name one file"
            )
        return named[0]
    check_hub_id(weights, "backbone.loras: weights")
    if download:
        return hub_file(weights, LORA_FILE, None, "backbone.loras: weights")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(weights, LORA_FILE)
    return Path(cached) if isinstance(cached, str) else None


def lora_id(weights: str) -> str | None:
    """The content hash of a LoRA's file; None if it is on the hub and not in the cache."""
    file = lora_file(weights)
    return None if file is None else _file_hash(file, file.stat().st_mtime_ns)


def require_lora_id(weights: str) -> str:
    """`lora_id`, or UserError where the file is not at hand."""
    found = lora_id(weights)
    if found is None:
        raise UserError(f"the LoRA {weights} is not in the local hub cache{FETCH_IT}")
    return found


def in_pipeline_layout(checker: str) -> bool:
    """Whether a safety checker's folder or hub id is a pipeline's, where the checker lies in a folder of its own."""
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
    """Brings a safety checker into the hub cache; the folder there, none where it is a folder already."""
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
    """Brings a CLIP model into the hub cache; the folder there, none where it is a folder already."""
    if expand_user(model, "scores.clip").is_dir():
        return []
    check_hub_id(model, "scores.clip")
    return [_snapshot(model, ["*.json", "merges.txt", "*.safetensors"], "scores.clip")]


def clip_id(model: str) -> str | None:
    """Tells a CLIP model from others: a content hash, or the commit of a hub id; None if it is not in the cache."""
    folder = expand_user(model, "scores.clip")
    if folder.is_dir():
        return _folder_hash(folder)
    check_hub_id(model, "scores.clip")
    return _commit(model, "config.json", None)


def require_clip_id(model: str) -> str:
    """`clip_id`, or UserError where the files are not at hand."""
    found = clip_id(model)
    if found is None:
        raise UserError(f"scores.clip={model} is not in the local hub cache{FETCH_IT}")
    return found


def checker_id(checker: str) -> str | None:
    """Tells a safety checker from others: a content hash, or the commit of a hub id; None if it is not in the cache."""
    folder = expand_user(checker, "safety.checker")
    if folder.is_dir():
        parts = [folder / part for part in CHECKER_PARTS] if in_pipeline_layout(checker) else [folder]
        return "-".join(_folder_hash(part) for part in parts)
    check_hub_id(checker, "safety.checker")
    return _commit(checker, f"{CHECKER_PARTS[0]}/config.json", None) or _commit(checker, "config.json", None)


def require_checker_id(checker: str) -> str:
    """`checker_id`, or UserError where the files are not at hand."""
    found = checker_id(checker)
    if found is None:
        raise UserError(f"safety.checker={checker} is not in the local hub cache{FETCH_IT}")
    return found


_impatient = ContextVar("impatient", default=False)


@contextmanager
def impatient() -> Iterator[None]:
    """Within it nobody waits for a hub that cannot be reached: what is not in the cache is missing at once."""
    token = _impatient.set(True)
    try:
        yield
    finally:
        _impatient.reset(token)


@lru_cache
def _reachable(endpoint: str) -> bool:
    """Whether the hub, or a proxy before it, takes a connection: asked once a process."""
    url = urlsplit(endpoint)
    if urllib.request.getproxies().get(url.scheme):
        return True
    try:
        with socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), 3):
            return True
    except OSError:
        return False


def hub_file(repository: str, name: str, revision: str | None, key: str = "backbone.pretrained") -> Path:
    """A file of a hub id, downloaded if need be; UserError if it cannot be had."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # without a network each retry would print two lines
    check_hub_id(repository, key)
    missing = f"{key}={repository!r} is neither a folder, {_or_demo(key)}nor a model"
    here = _impatient.get() and not _reachable(constants.ENDPOINT)  # the library would ask six times, for 23 s
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=here))
    except LocalEntryNotFoundError as error:
        why = f"the hub cannot be reached from here{FETCH_IT}"
        raise UserError(f"{missing} in the local hub cache, and {why}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{missing} that the hub gives: {str(error).strip().splitlines()[0]}") from error


def check_hub_id(name: str, key: str = "backbone.pretrained") -> None:
    """UserError for what cannot be the name of a repository."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        raise UserError(f"{key}={name!r} is neither a folder, {_or_demo(key)}nor a hub id (owner/name)")


def _or_demo(key: str) -> str:
    return "nor 'demo', " if key.startswith("backbone.") else ""


def _commit(repository: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name, revision=revision)
    return f"commit-{Path(cached).parent.name}" if isinstance(cached, str) else None


@lru_cache
def _file_hash(file: Path, changed: int) -> str:
    """Read once a node, unless the file was `changed` since (mtime in ns)."""

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
