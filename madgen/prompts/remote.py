"""Download prompt files, and the masks beside them, from any file system that fsspec supports."""

from __future__ import annotations

import glob
import hashlib
import json
import posixpath
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from madgen.prompts.picture_files import url_beside
from madgen.prompts.readers import PromptFile
from madgen.utils.errors import UserError
from madgen.utils.filesystems import WEB, check_client_installed, errors_of, file_system, protocol_of

_downloads: dict[str, tuple[str, PromptFile]] = {}


def download_masks(file: PromptFile, where: object, masks: Sequence[str]) -> None:
    """Download mask files beside a downloaded prompt file. Raises UserError for other paths and missing files."""
    for mask in masks:
        url = url_beside(where, "mask", mask, file.name)
        target = file.path.parent / posixpath.normpath(mask)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with errors_of(f"{where}: mask {url}"):
                fs, root = file_system(url)
                fs.get_file(root, str(target))


def remote_urls(source: str) -> list[str]:
    """Return the URLs of the files that a URL matches, sorted. Raises UserError if there are none."""
    check_client_installed("prompts.source", source)
    if not glob.has_magic(source) or protocol_of(source) in WEB:
        return [source]
    with errors_of(f"prompts.source={source}"):
        fs, root = file_system(source)
        fs.invalidate_cache()
        urls = sorted(fs.unstrip_protocol(path) for path, info in fs.glob(root, detail=True).items() if _is_file(info))
    if not urls:
        raise UserError(f"prompts.source={source} matches no file")
    return urls


def download(url: str) -> PromptFile:
    """Download a prompt file, once per process as long as it does not change. Raises UserError.

    Its folder, to which its masks are downloaded as well, is removed when the process ends.
    """
    with errors_of(f"prompts.source={url}"):
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
    file = PromptFile(path, url, sha256)
    _downloads[url] = state, file
    return file


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="madgen-prompts-")


def _is_file(info: dict[str, Any]) -> bool:
    return info.get("type") != "directory"
