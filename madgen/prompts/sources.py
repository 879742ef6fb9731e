"""Resolve `prompts.source`: a file, a glob pattern, a URL, or a Hugging Face dataset."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from madgen.config.schema import PROMPT_FIELDS, PromptsConfig
from madgen.prompts.picture_files import Access
from madgen.prompts.readers import Chunk, PromptFile, Reader, ReadOptions, known_suffixes, reader_of
from madgen.prompts.readers._dataset import dataset_tars, is_dataset, read_dataset
from madgen.prompts.readers._hub import dataset_files, is_hub, local_folder, read_hub
from madgen.prompts.remote import download, remote_urls
from madgen.prompts.template import NAME, Template
from madgen.utils.errors import UserError
from madgen.utils.filesystems import protocol_of


@dataclass(frozen=True)
class PromptSource:
    """A prompt file or a dataset."""

    name: str
    """Name in messages."""
    folder: Path | None
    """Folder that mask files in its rows are relative to; None for a dataset on the Hub."""
    files: Callable[[], list[Path]]
    """Return its files, as far as they are on this machine."""
    read: Callable[[], Iterator[Chunk]]
    remote: PromptFile | None = None
    """The file that it was downloaded from."""

    def access(self, config: PromptsConfig, confined: bool) -> Access:
        """Return where the pictures of its rows may be; `confined`: files inside of its folder only."""
        url = None if self.remote is None else self.remote.name
        return Access(self.folder, confined, tuple(config.allow_picture_urls), url)


def find_sources(config: PromptsConfig, fields: tuple[str, ...] = PROMPT_FIELDS) -> list[PromptSource]:
    """Return the sources of a job, at least one, files in the order of their paths; `fields`: those of a row.

    An existing file takes precedence over a pattern. Raises UserError if nothing is found, or if `split` or `columns`
    does not apply.
    """
    source, split = config.source, config.split
    if config.template is not None:
        return [PromptSource(NAME, Path(), list, Template(config).read)]
    options = ReadOptions(config.columns, config.keep_columns or (), config.comments, fields)
    if is_hub(source):
        _check_comments(source, options, supported=False)
        files, read = partial(dataset_files, source), partial(read_hub, source, split, options)
        files()  # raises UserError if the name is invalid
        return [PromptSource(source, local_folder(source), files, read)]
    if split != "train":
        raise UserError(f"prompts.split={split} needs a Hugging Face dataset (hf://...), not {source}; remove it")
    if is_dataset(source):
        _check_comments(source, options, supported=False)
        tars = dataset_tars(source)
        return [PromptSource(source, tars[0].parent, lambda: tars, partial(read_dataset, source, options))]
    if "://" in source and protocol_of(source) != "file":
        return [_remote(url, options) for url in remote_urls(source)]
    return [_file(PromptFile(path, str(path)), options) for path in _paths(source.removeprefix("file://"))]


def _paths(source: str) -> list[Path]:
    if os.path.lexists(source):
        return [Path(source)]
    if not glob.has_magic(source):
        slashes = re.match(r"([a-z][a-z0-9+.-]+):/*(?=[^/])", source)
        hint = f"; a URL starts with {slashes[1]}://" if slashes else ""
        if source == PromptsConfig.source:
            default = "the default where prompts.source is not set"
            raise UserError(f"prompts.source={source}, {default}, does not exist; set it to a prompt file")
        raise UserError(f"prompts.source={source} does not exist{hint}")
    try:
        paths = sorted({Path(path) for path in glob.glob(source, recursive=True) if not os.path.isdir(path)})
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"prompts.source={source} is not a valid pattern: {error}") from error
    if not paths:
        raise UserError(f"prompts.source={source} does not exist, and matches no file; quote patterns in a shell")
    return paths


def _file(file: PromptFile, options: ReadOptions) -> PromptSource:
    path = file.path
    if path.is_dir():
        raise UserError(f"prompts.source={path} is a directory; name a file, or a pattern such as {path}/*.txt")
    reader = _reader(file.name, options)
    if not path.is_file():
        raise UserError(
            f"prompts.source={path} is not a regular file; prompts are read from {', '.join(known_suffixes())}"
        )
    return PromptSource(str(path), path.parent, lambda: [path], partial(reader.read, file, options))


def _remote(url: str, options: ReadOptions) -> PromptSource:
    reader = _reader(url, options)
    remote = download(url)
    return PromptSource(url, remote.path.parent, list, partial(reader.read, remote, options), remote)


def _reader(name: str, options: ReadOptions) -> Reader:
    """Return the reader of a file. Raises UserError if an option does not apply to its format."""
    reader = reader_of(name)
    if (options.columns or options.keep) and not reader.COLUMNS:
        setting = "prompts.columns" if options.columns else "prompts.keep_columns"
        raise UserError(f"{setting} does not apply to {name}, which has no columns; leave it empty")
    _check_comments(name, options, reader.COMMENTS)
    return reader


def _check_comments(source: str, options: ReadOptions, supported: bool) -> None:
    if options.comments is not None and not supported:
        raise UserError(f"prompts.comments does not apply to {source}, only to .txt; set it to null")
