"""Load job files: bases, overrides, validation. The only module that imports OmegaConf."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from madgen.config.documentation import summary
from madgen.config.explanations import check_shapes, explain, paired
from madgen.config.schema import Job, check_recordable
from madgen.utils.errors import UserError
from madgen.utils.resources import resource
from madgen.utils.validation import expand_user, listed, nearest, path, texts

DATASET = "dataset://"
PRESETS = ("configs/*/*.yaml",)
JOBS = ("jobs/*.yaml", *PRESETS)
"""Packaged jobs, then presets."""


class UnknownPresetError(UserError):
    """A name is neither a file nor that of a preset."""


def load_job(paths: str | Path | Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> Job:
    """Load job files (later ones win), each after its `base:` files, then apply `key=value` overrides.

    Raises UserError for a missing file, invalid YAML, an unknown key (naming the most similar one) or an invalid value.
    """
    paths = [paths] if isinstance(paths, str | Path) else listed("paths", paths)
    files, overrides = [_job_file(path("a job file", one)) for one in paths], texts("overrides", overrides)
    layers = [layer for file in files for _, layer in _sources(file, ())]
    return build_job(layers, files[0].stem if files else "job", files, overrides)


def load_origins(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return where each key that is set comes from, such as `{"sampling.width": "jobs/demo.yaml"}`, as `load_job`."""
    origins: dict[str, str] = {}
    for file in (_job_file(path("a job file", one)) for one in paths):
        for source, layer in _sources(file, ()):
            origins |= dict.fromkeys(_set_keys(OmegaConf.to_container(layer)), _origin(source))
    for text in overrides:
        origins |= dict.fromkeys(_set_keys(OmegaConf.to_container(_override(text))), "command line")
    return origins


def _origin(file: Path) -> str:
    """Return a short path of a job file."""
    for folder in (resource("configs").parent, Path.cwd()):
        if file.is_relative_to(folder):
            return str(file.relative_to(folder)).removeprefix("_")
    return str(file)


def _set_keys(content: Any, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        yield "method.mad.steps" if name == "method.mad.share" else name  # converted to steps
        if isinstance(value, dict):
            yield from _set_keys(value, f"{name}.")


def job_of(contents: Iterable[dict[str, Any]], name: str, file: Path, overrides: Sequence[str] = ()) -> Job:
    """Build a job from contents of job files that are parts of `file`; paths in them are relative to `file`."""
    layers = [layer for content in contents for _, layer in _with_bases(content, file.resolve(), ())]
    return build_job(layers, name, [file], overrides)


def build_job(
    layers: list[DictConfig], name: str, files: Sequence[Path], overrides: Sequence[str], base: Job | None = None
) -> Job:
    """Merge layers and overrides into `base`, by default a job with default values, and validate the result."""
    layers = [OmegaConf.create({"name": name}), *layers, *(_override(text) for text in overrides)]
    defaults = Job().as_dict()
    for layer in layers:
        content = OmegaConf.to_container(layer)
        _check_interpolations(content)
        check_recordable(content)
        check_shapes(content, defaults)
        _unset_other_mad_key(layer)
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base) if base else _default_job(), *layers))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    except TypeError as error:  # from OmegaConf, for a mapping in place of a list that is null by default
        pairs = (pair for layer in layers for pair in paired(OmegaConf.to_container(layer), defaults))
        names = [name for name, value, default in pairs if isinstance(value, dict) and default is None]
        raise UserError(f"{', '.join(names) or 'a key'} must be a list or null, got a mapping") from error
    assert isinstance(job, Job)
    _check_strings(OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True), job.as_dict())
    folders = [file.resolve().parent for file in files]
    source = job.prompts.source if job.prompts.template is not None else _find_source(job.prompts.source, folders)
    regions = [_resolve_mask(region, folders) for region in job.prompts.regions]
    return replace(job, prompts=replace(job.prompts, source=source, regions=regions))


@cache
def _default_job() -> DictConfig:
    """Return the schema with default values; `OmegaConf.merge` copies it, which is faster than building it again."""
    return OmegaConf.structured(Job)


def _unset_other_mad_key(layer: DictConfig) -> None:
    """Let a layer that sets one of `method.mad.steps` and `method.mad.share` unset the other one of earlier layers."""
    method = layer.get("method")
    mad = method.get("mad") if isinstance(method, DictConfig) else None
    if isinstance(mad, DictConfig):
        if mad.get("steps") is not None and mad.get("share") is not None:
            raise UserError(
                f"method.mad.steps={mad.steps} and method.mad.share={mad.share} contradict each other; set one of them"
            )
        for key, other in (("steps", "share"), ("share", "steps")):
            if mad.get(key) is not None and other not in mad:
                mad[other] = None


def _resolve_mask(region: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    mask = region.get("mask")
    file = Path(_find(mask, folders)) if isinstance(mask, str) else None
    return {**region, "mask": str(file.absolute())} if file is not None and file.exists() else region


def _check_interpolations(value: Any, name: str = "") -> None:
    """Refuse `${oc.env:...}` and other resolvers: values are recorded in the dataset and published with it."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_interpolations(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and re.search(r"\$\{[^}]*[:$]", value):
        raise UserError(
            f"{name}={value}: a job may refer to its own keys only, such as ${{sampling.width}}; environment variables "
            "are not read, since all values are recorded in the dataset: write the value"
        )


def _check_strings(content: Any, converted: Any) -> None:
    """Refuse a string that YAML has parsed as another type, such as `no` as false or `007` as 7."""
    for name, value, final in paired(content, converted):
        if isinstance(final, str) and not isinstance(value, str):
            about = summary(Job(), name)
            about = f" ({about})" if about else ""
            raise UserError(f"{name} must be a string, but YAML parses it as {value!r}; put it in quotes{about}")


def _find(name: str, folders: Sequence[Path], key: str = "a mask") -> str:
    """Resolve a path against the current directory, or else against the first of `folders` in which it exists."""
    path = expand_user(name, key)
    candidates = [path, *(folder / path for folder in folders)]
    return str(next((candidate for candidate in candidates if os.path.exists(candidate)), path))


def _find_source(source: str, folders: Sequence[Path]) -> str:
    """Resolve `prompts.source`: a file, a dataset or else a glob pattern, as `_find`; URLs stay as they are."""
    if source.startswith(DATASET):
        return DATASET + _find(source.removeprefix(DATASET), folders, "prompts.source")
    if "://" in source:
        return source
    file = _find(source, folders, "prompts.source")
    if os.path.exists(file) or not glob.has_magic(source):
        return file
    patterns = [file, *(os.path.join(glob.escape(str(folder)), source) for folder in folders)]
    return next((pattern for pattern in patterns if any(glob.iglob(pattern, recursive=True))), file)


def _override(text: str) -> DictConfig:
    key, separator, value = text.partition("=")
    if not (separator and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key.strip())):
        raise UserError(f"an override must be key=value, got {text!r}; example: sampling.width=2048")
    if " #" in f" {value}" and value.strip()[:1] not in tuple("'\"[{"):
        text = f"{key}={json.dumps(value.strip(), ensure_ascii=False)}"  # or YAML would take the rest for a comment
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        fix = str(error).splitlines()[0]
        if isinstance(error, YAMLError):
            fix = "close its brackets and quotes, and quote it in a shell"
        raise UserError(f"cannot read the override {text!r}: {fix}") from error


def _sources(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, DictConfig]]:
    """Load the bases of a file, depth first, then the file itself, each with its path."""
    shown, path = path, path.resolve()
    if path.suffix.lower() in (".txt", ".jsonl", ".csv", ".parquet", ".gz"):
        raise UserError(f"{shown} is a prompt file, not a job file; pass a job file, and prompts.source={shown}")
    if path in seen:
        raise UserError(f"{shown} is a base of itself; remove it from base")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"job file {shown} does not exist{_similar_file(shown)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the job file {shown}: {error}") from error
    except RecursionError:
        raise UserError(f"{shown} is nested too deeply; a job file has at most a few levels") from None
    except YAMLError as error:
        raise UserError(f"{shown} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{shown} must contain a mapping (key: value) at the top level")
    content: Any = OmegaConf.to_container(loaded)
    return _with_bases(content, path, seen)


def _job_file(name: str, folder: Path = Path(), packaged: Sequence[str] = JOBS) -> Path:
    """Resolve a path relative to `folder`, or else the name of a packaged file, such as `demo` or `fast`.

    Of packaged files with equal names, that of the first pattern counts.
    """
    if (folder / name).is_file() or not re.fullmatch(r"[\w-]+", name):
        return folder / name
    files = {file.stem: file for pattern in reversed(packaged) for file in _matches(pattern)}
    if name not in files:
        if (here := Path(f"{name}.yaml")).is_file():
            raise UnknownPresetError(f"there is no preset {name!r}; did you mean the file {str(here)!r}?")
        raise UnknownPresetError(f"there is neither a file nor a preset {name!r}{nearest(name, sorted(files), 0.6)}")
    return files[name]


def _similar_file(path: Path) -> str:
    """Return the end of an error about a missing job file: the packaged file or the one beside it that is meant.

    A piece of an override with spaces is taken for a file if the shell has split it.
    """
    if path.name[-1:] in ("}", "]", ","):
        return "; put an override with spaces in quotes, such as 'sampling.scheduler_options={shift: 3}'"
    if any(file.stem == path.stem for folder in JOBS for file in _matches(folder)):
        return f"; the packaged one is called {path.stem!r}"
    close = difflib.get_close_matches(path.name, sorted(file.name for file in path.parent.glob("*.y*ml")), 1, 0.75)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def _matches(pattern: str) -> list[Path]:
    folder, _, names = pattern.partition("/")
    return sorted(resource(folder).glob(names))


def _with_bases(content: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, DictConfig]]:
    base, content = content.get("base") or [], {key: value for key, value in content.items() if key != "base"}
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{path}: base must be a path or a list of paths, got {base!r}")
    files = (_job_file(str(expand_user(name, "base")), path.parent, PRESETS) for name in bases)
    return [*(source for file in files for source in _sources(file, (*seen, path))), (path, OmegaConf.create(content))]
