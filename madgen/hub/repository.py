"""Find files of Hub repositories in the local cache, or download them."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from madgen.hub.content_hash import folder_hash
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

FETCH_HINT = "; run `madgen fetch JOB.yaml` on a machine with a network, such as a login node, to download it"


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


def check_hub_id(name: str, key: str = "backbone.pretrained") -> None:
    """Raise UserError if `name` is not a valid repository name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        raise UserError(f"{key}={name!r} is neither a folder, {_or_demo(key)}nor a Hub id (owner/name)")


def _or_demo(key: str) -> str:
    return "nor 'demo', nor 'demo-dit', " if key.startswith("backbone.") else ""


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


def download(model: str, patterns: list[str], key: str) -> list[Path]:
    """Download the files of a Hub id that match `patterns`; return their folder in the cache, nothing for a folder.

    Raises UserError, which names the setting `key`, if they are not available.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if expand_user(model, key).is_dir():
        return []
    check_hub_id(model, key)
    try:
        return [Path(snapshot_download(model, allow_patterns=patterns))]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"cannot download {key}={model}: {str(error).strip().splitlines()[0]}") from error


def identify(model: str, key: str) -> str | None:
    """Identify a model by the content hash of its folder, or the commit of a Hub id; None if it is not in the cache."""
    folder = expand_user(model, key)
    if folder.is_dir():
        return folder_hash(folder)
    check_hub_id(model, key)
    return cached_commit(model, "config.json")


def cached_file(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Return the path of a cached file of a repository; None if it is not in the cache, or for another name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def cached_commit(repository: str, name: str, revision: str | None = None) -> str | None:
    """Return the commit of a cached file of a repository as `commit-<hash>`; None if it is not in the cache."""
    cached = cached_file(repository, name, revision)
    return None if cached is None else f"commit-{cached.parent.name}"
