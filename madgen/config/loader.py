"""Job files to a Job. The only module that knows OmegaConf."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from madgen.config.schema import Job
from madgen.utils.errors import UserError
from madgen.utils.validation import listed, path, texts


def load_job(paths: str | Path | Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> Job:
    """Reads job files (later ones win), their `base:` files first, then `key=value` overrides.

    Raises UserError on a missing file, bad YAML, an unknown key (naming the nearest one) or a bad value.
    """
    given = [paths] if isinstance(paths, str | Path) else listed("paths", paths)
    files, overrides = [Path(path("a job file", one)) for one in given], texts("overrides", overrides)
    layers = [layer for file in files for layer in _layers(file, ())]
    return _build(layers, files[0].stem if files else "job", files, overrides)


def job_of(contents: Iterable[dict[str, Any]], name: str, file: Path, overrides: Sequence[str] = ()) -> Job:
    """As `load_job`, of what job files could hold: parts of `file`, to which their bases and sources are relative."""
    layers = [layer for content in contents for layer in _with_bases(content, file.resolve(), ())]
    return _build(layers, name, [file], overrides)


def _build(layers: list[DictConfig], name: str, files: Sequence[Path], overrides: Sequence[str]) -> Job:
    layers = [OmegaConf.create({"name": name}), *layers, *(_override(text) for text in overrides)]
    for layer in layers:
        _refuse_tables_for_lists(OmegaConf.to_container(layer), Job().as_dict())
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Job), *layers))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    assert isinstance(job, Job)
    _refuse_converted(OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True), job.as_dict())
    folders = [file.resolve().parent for file in files]
    source = _find_source(job.prompts.source, folders)
    regions = [_with_mask_found(region, folders) for region in job.prompts.regions]
    return replace(job, prompts=replace(job.prompts, source=source, regions=regions))


def _with_mask_found(region: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    mask = region.get("mask")
    found = Path(_find(mask, folders)) if isinstance(mask, str) else None
    return {**region, "mask": str(found.absolute())} if found is not None and found.exists() else region


def _refuse_tables_for_lists(given: Any, known: Any, name: str = "") -> None:
    """OmegaConf has no name for this mistake, nor for the key at fault."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            _refuse_tables_for_lists(value, known.get(key), f"{name}.{key}" if name else key)
    elif isinstance(given, dict) and isinstance(known, list | tuple):
        raise UserError(f"{name} is a list: write {name}=[...], got keys and values")


def _refuse_converted(given: Any, taken: Any, name: str = "") -> None:
    """YAML reads `no` as false and `007` as 7; where a text is wanted, that is not what was meant."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for key, value in given.items():
            _refuse_converted(value, taken.get(key), f"{name}.{key}" if name else key)
    elif isinstance(given, list) and isinstance(taken, list | tuple):
        for value, final in zip(given, taken, strict=False):
            _refuse_converted(value, final, name)
    elif isinstance(taken, str) and not isinstance(given, str):
        raise UserError(f"{name} must be a text, YAML reads it as {given!r}; put it in quotes")


def _find(name: str, folders: Sequence[Path]) -> str:
    """The path of a file: relative to the current directory, or else to the first job file that has it."""
    path = Path(name).expanduser()
    candidates = [path, *(folder / path for folder in folders)]
    return str(next((candidate for candidate in candidates if os.path.exists(candidate)), path))


def _find_source(source: str, folders: Sequence[Path]) -> str:
    """As `_find`, of prompt files by their name or else by a pattern; a dataset's name is left as it is."""
    if source.startswith("hf://"):
        return source
    found = _find(source, folders)
    if os.path.exists(found) or not glob.has_magic(source):
        return found
    patterns = [found, *(os.path.join(glob.escape(str(folder)), source) for folder in folders)]
    return next((pattern for pattern in patterns if any(glob.iglob(pattern, recursive=True))), found)


def _override(text: str) -> DictConfig:
    key, separator, _ = text.partition("=")
    if not (separator and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key.strip())):
        raise UserError(f"an override is key=value, got {text!r}; example: sampling.width=2048")
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"cannot read the override {text!r}: {str(error).splitlines()[0]}") from error


def _layers(path: Path, seen: tuple[Path, ...]) -> list[DictConfig]:
    """The file's bases, depth first, then the file itself."""
    path = path.resolve()
    if path.suffix.lower() in (".txt", ".jsonl", ".csv", ".parquet", ".gz"):
        raise UserError(f"{path} is a prompt file, not a job; give the job, and prompts.source={path}")
    if path in seen:
        raise UserError(f"{path} is its own base")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"no job file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the job file {path}: {error}") from error
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values at its top level")
    content: Any = OmegaConf.to_container(loaded)
    return _with_bases(content, path, seen)


def _with_bases(content: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> list[DictConfig]:
    base, content = content.get("base") or [], {key: value for key, value in content.items() if key != "base"}
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{path}: base must be a file or a list of files, got {base!r}")
    layers = [layer for name in bases for layer in _layers(path.parent / name, (*seen, path))]
    return [*layers, OmegaConf.create(content)]


def _explain(error: OmegaConfBaseException) -> str:
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    if " is not a subclass of " in first:
        section = first.split(" is not a subclass of ")[1].split(".")[0]
        name = section.removesuffix("Config").lower()
        return f"{name} holds keys of its own, such as {name}.{_first_key(name)}; got a plain value"
    if "is not a TupleConfig, ListConfig" in first or "is not a ListConfig" in first:
        return f"{key} is a list: write {key}=[...], such as method.mad.blocks=[up]"
    if key and "not in" in first:
        return f"unknown key {key!r}{_nearest(str(key), _known_keys(Job()))}"
    return f"{key}: {first}" if key else first


def _first_key(section: str) -> str:
    known = _known_keys(Job(name="job"))
    return next((name.rpartition(".")[2] for name in known if f"{section}." in name), "key")


def _nearest(key: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], [name.rpartition(".")[2] for name in known], n=1)
    if not close and leaf:
        close = [name for name in known if name.rpartition(".")[2] == leaf[0]][:1]
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(k for k in known if '.' not in k)}"


def _known_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(config):
        keys.append(prefix + item.name)
        value = getattr(config, item.name)
        if is_dataclass(value):
            keys.extend(_known_keys(value, f"{prefix}{item.name}."))
    return keys
