"""File systems of URLs such as `s3://bucket/folder`. The only module that imports fsspec."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from madgen.utils.errors import UserError

EXTRAS = {"s3": "pip install 'madgen[s3]'", "gs": "pip install 'madgen[gcs]'"}
WEB = ("http", "https")
"""Protocols without patterns and reliable checksums."""
SAME = {"s3a": "s3", "gcs": "gs", "local": "file"}


def protocol_of(url: str) -> str:
    """Return the protocol of a URL, by its most common name: `s3` for `s3a://bucket/folder`."""
    protocol = url.partition("://")[0]
    return SAME.get(protocol, protocol)


def check_client_installed(name: str, url: str) -> None:
    """Raise UserError if no file system for the URL's protocol is installed, without network access."""
    from fsspec.registry import known_implementations, registry

    protocol = url.partition("://")[0]
    if protocol in registry:
        return
    known = known_implementations.get(protocol)
    if known is None:
        raise UserError(f"{name}={url}: fsspec knows no {protocol}://; s3, gs, hf, az, file are some that it knows")
    package = known["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        how = EXTRAS.get(protocol_of(url), f"pip install {package}")
        raise UserError(f"{name}={url}: {protocol}:// needs the package {package}: {how}")


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(url)


class MissingError(UserError):
    """There is no such file."""


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Raise the errors of a file system as UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec's for any error of an HTTP request
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise UserError(f"{what} cannot be reached: {' '.join(str(cause).split())[:200]}") from error
        raise MissingError(f"{what} does not exist") from error
    except ImportError as error:
        raise UserError(f"{what} needs a package that is not installed: {error}") from error
    except Exception as error:  # each file system raises its own kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} cannot be read: {type(error).__name__}: {reason}") from error
