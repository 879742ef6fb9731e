"""Download prompt files, and the masks beside them, from any file system that fsspec supports."""

from __future__ import annotations

import glob
import hashlib
import json
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from madgen.prompts.readers import PromptFile
from madgen.utils.errors import UserError
from madgen.utils.filesystems import check_client_installed, file_system, protocol_of

WEB = ("http", "https")  # without patterns and reliable checksums
_downloads: dict[str, tuple[str, RemoteFile]] = {}


@dataclass(frozen=True)
class RemoteFile:
    """A downloaded prompt file. Its folder is removed when the process ends."""

    url: str
    file: PromptFile
    sha256: str

    @property
    def folder(self) -> Path:
        """Return the folder that masks are downloaded to, under the same relative paths."""
        return self.file.path.parent

    def download_masks(self, where: object, masks: Sequence[str]) -> None:
        """Download mask files, relative to the prompt file. Raises UserError for other paths and missing files."""
        base = self.url.rpartition("/")[0]
        for mask in masks:
            name = posixpath.normpath(mask)
            if "://" in mask or "\\" in mask or name.startswith(("/", "..", "~")):
                raise UserError(f"{where}: mask {mask!r} must be a path relative to {base}, and inside of it")
            target = self.folder / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with _errors(f"{where}: mask {base}/{name}"):
                    fs, root = file_system(f"{base}/{name}")
                    fs.get_file(root, str(target))


def remote_urls(source: str) -> list[str]:
    """Return the URLs of the files that a URL matches, sorted. Raises UserError if there are none."""
    check_client_installed("prompts.source", source)
    if not glob.has_magic(source) or protocol_of(source) in WEB:
        return [source]
    with _errors(f"prompts.source={source}"):
        fs, root = file_system(source)
        fs.invalidate_cache()
        urls = sorted(fs.unstrip_protocol(path) for path, info in fs.glob(root, detail=True).items() if _is_file(info))
    if not urls:
        raise UserError(f"prompts.source={source} matches no file")
    return urls


def download(url: str) -> RemoteFile:
    """Download a prompt file, once per process as long as it does not change. Raises UserError."""
    with _errors(f"prompts.source={url}"):
        fs, root = file_system(url)
        fs.invalidate_cache()
        info = fs.info(root)
        if not _is_file(info):
            raise UserError(
                f"prompts.source={url} is a folder; name a file, or a pattern such as {url.rstrip('/')}/*.txt"
            )
        state = json.dumps(info, default=str, sort_keys=True)
        if url in _downloads and _downloads[url][0] == state and protocol_of(url) not in WEB:
            return _downloads[url][1]
        path = Path(tempfile.mkdtemp(dir=_scratch().name)) / posixpath.basename(root)
        fs.get_file(root, str(path))
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    remote = RemoteFile(url, PromptFile(path, url), sha256)
    _downloads[url] = state, remote
    return remote


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="madgen-prompts-")


def _is_file(info: dict[str, Any]) -> bool:
    return info.get("type") != "directory"


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Raise the errors of a file system as UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{what} does not exist") from error
    except ImportError as error:
        raise UserError(f"{what} needs a package that is not installed: {error}") from error
    except Exception as error:  # each file system raises its own kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} cannot be read: {type(error).__name__}: {reason}") from error
