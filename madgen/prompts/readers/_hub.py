"""Hugging Face datasets: `hf://owner/name`, `hf://owner/name/config`, or a local folder as `hf:///a/folder`."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions, reader_of, suffix_of
from madgen.prompts.readers._arrow import arrow_chunks, rows_at_once
from madgen.prompts.readers._columns import choose_columns
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

SCHEME = "hf://"
AS_TEXT = (".csv", ".tsv", ".jsonl")  # read by madgen, since the library guesses the types of their values
NO_DATA = ("", ".md", ".yaml", ".yml")  # suffixes of files of a dataset on the Hub that hold no rows
SAVED = ("state.json", "dataset_dict.json", "dataset_info.json")  # files that `Dataset.save_to_disk` writes


def is_hub(source: str) -> bool:
    """Return whether a source is a dataset, not a file."""
    return source.startswith(SCHEME)


def local_folder(source: str) -> Path | None:
    """Return the folder of a local dataset; None for one on the Hub. Raises UserError for an invalid name."""
    name = source.removeprefix(SCHEME)
    if name.startswith(("/", "./", "../", "~")):
        folder = expand_user(name, "prompts.source")
        if not folder.is_dir():
            raise UserError(f"prompts.source={source}: folder {folder} does not exist")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*){1,2}", name, re.ASCII):
        raise UserError(f"prompts.source={source} must be hf://owner/name, hf://owner/name/config or hf:///a/folder")
    if Path(name).exists():  # the library would load it instead
        raise UserError(
            f"prompts.source={source} is ambiguous: a folder {name} exists too; write hf://./{name}, or rename it"
        )
    return None


def dataset_files(source: str) -> list[Path]:
    """Return the files of a dataset, as far as they are on this machine.

    For a dataset on the Hub these are all cached files of its owner, since the library's cache renames datasets.
    """
    folder = local_folder(source)
    if folder is not None:
        return _below(folder)
    import datasets

    owner = source.removeprefix(SCHEME).split("/")[0]
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    folders = sorted(cache.glob(f"{owner}___*"))
    snapshot = _text_snapshot(source, local_only=True)
    return [file for folder in [*folders, *([snapshot] if snapshot else [])] for file in _below(folder)]


def _text_snapshot(source: str, local_only: bool = False) -> Path | None:
    """Download a dataset of text files on the Hub; return its folder in the cache.

    None if it has other files, such as Parquet, or if it is neither cached nor can be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    name = "/".join(source.removeprefix(SCHEME).split("/")[:2])
    try:
        if not local_only:
            with contextlib.suppress(OfflineModeIsEnabled):
                siblings = HfApi().dataset_info(name).siblings or []
                if not _is_text(item.rfilename for item in siblings):
                    return None
        folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=local_only))
    except Exception:  # the client passes on errors of its HTTP library; `load_dataset` reports them
        return None
    return folder if _is_text(file.relative_to(folder).as_posix() for file in _below(folder)) else None


def _is_text(names: Iterable[str]) -> bool:
    """Return whether all files with rows are read as text."""
    suffixes = {suffix_of(name) for name in names if not name.startswith(".")} - set(NO_DATA)
    return bool(suffixes) and suffixes <= set(AS_TEXT)


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def read_hub(source: str, split: str, options: ReadOptions) -> Iterator[Chunk]:
    """Read the rows of a split. Raises UserError if there is no such dataset, locally or on the Hub."""
    with tempfile.TemporaryDirectory(prefix="madgen-") as scratch:
        dataset = _load(source, split, scratch)
        if isinstance(dataset, list):
            yield from _read_files(dataset, options)
            return
        name = f"{source}[{split}]"
        present = dataset.column_names or list(next(iter(dataset), {}))
        choice = choose_columns(name, present, options)
        tables = dataset.select_columns(choice.columns).with_format("arrow").iter(batch_size=rows_at_once(choice))
        yield from arrow_chunks(name, tables, choice)


def _read_files(files: Sequence[Path], options: ReadOptions) -> Iterator[Chunk]:
    """Read text files as prompt files are read; rows are numbered across all of them."""
    first = 1
    for file in files:
        for chunk in reader_of(file.name).read(PromptFile(file, str(file)), options):
            yield replace(chunk, lines=range(first, first + len(chunk.rows)))
            first += len(chunk.rows)


def _load(source: str, split: str, scratch: str) -> Any:
    """Load a dataset; `scratch` is the library's cache folder for local datasets.

    Returns a list of files if these are to be read as text.
    """
    import datasets
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    folder, config = local_folder(source), list[str]()
    try:
        if folder is None:
            owner, name, *config = source.removeprefix(SCHEME).split("/")
            snapshot = _text_snapshot(source)
            if snapshot is None:
                return datasets.load_dataset(f"{owner}/{name}", *config, split=split)
            folder = snapshot
        if any((folder / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(str(folder))
            parts = saved.values() if isinstance(saved, dict) else [saved]
            _check_inside(folder, source, (file["filename"] for part in parts for file in part.cache_files))
            return _select_split(saved, source, split)
        files = datasets.load_dataset_builder(str(folder), *config, cache_dir=scratch).config.data_files or {}
        _check_inside(folder, source, (str(file) for part in files.values() for file in part))
        if split in files and all(suffix_of(str(file)) in AS_TEXT for file in files[split]):
            return [Path(file) for file in files[split]]
        # Streaming avoids a copy of local files in the user's cache.
        return datasets.load_dataset(str(folder), *config, split=split, streaming=True, cache_dir=scratch)
    except UserError:
        raise
    except Exception as error:  # the library passes on errors of its file systems, Hub client and file readers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"prompts.source={source}: cannot load split {split!r}: {reason}; use a dataset folder, a dataset in the "
            "local cache, or a reachable one on the Hub, and one of its splits (prompts.split)"
        ) from error


def _check_inside(folder: Path, source: str, files: Iterable[str]) -> None:
    """Raise UserError if the folder's metadata, or a link in it, makes the library read files outside of it."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # a Hub cache links to its blobs
        roots.append(folder.resolve().parents[1] / "blobs")
    for file in files:
        if "://" in file or not any(Path(file).resolve().is_relative_to(root) for root in roots):
            raise UserError(
                f"prompts.source={source} reads {file}, which is outside the folder; copy it into the folder"
            )


def _select_split(saved: Any, source: str, split: str) -> Any:
    if isinstance(saved, dict):
        if split in saved:
            return saved[split]
        splits = ", ".join(saved)
        raise UserError(f"prompts.source={source} has no split {split!r}; set prompts.split to one of {splits}")
    if split not in ("train", str(saved.split)):
        raise UserError(f"prompts.source={source} has no splits, got prompts.split={split}; remove prompts.split")
    return saved
