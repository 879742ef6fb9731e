"""Load job files: bases, overrides, validation. The only module that imports OmegaConf."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from madgen.config.schema import Job, check_recordable
from madgen.utils.errors import UserError
from madgen.utils.resources import resource
from madgen.utils.validation import expand_user, listed, nearest, path, texts

DATASET = "dataset://"


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
    for layer in layers:
        content = OmegaConf.to_container(layer)
        _check_interpolations(content)
        check_recordable(content)
        _check_lists(content, _default_values())
        _unset_other_mad_key(layer)
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base) if base else _default_job(), *layers))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    except TypeError as error:  # from OmegaConf, for a mapping in place of a list that is null by default
        contents = (OmegaConf.to_container(layer) for layer in layers)
        names = [name for content in contents for name in _mappings_for_null(content, _default_values())]
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


@cache
def _default_values() -> dict[str, Any]:
    return Job().as_dict()


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


def _check_lists(value: Any, default: Any, name: str = "") -> None:
    """Refuse a mapping in place of a list, and the reverse; OmegaConf's errors do not name the key."""
    if isinstance(value, dict) and isinstance(default, dict):
        for key, item in value.items():
            _check_lists(item, default.get(key), f"{name}.{key}" if name else key)
    elif isinstance(value, dict) and isinstance(default, list | tuple):
        raise UserError(f"{name} is a list: write {name}=[...], got a mapping")
    elif isinstance(value, list) and isinstance(default, dict):
        raise UserError(f"{name} is a mapping: write {name}={{key: value}}, got a list")


def _mappings_for_null(value: Any, default: Any, name: str = "") -> Iterator[str]:
    """Yield the keys with a mapping whose default is null."""
    if isinstance(value, dict) and isinstance(default, dict):
        for key, item in value.items():
            yield from _mappings_for_null(item, default.get(key), f"{name}.{key}" if name else key)
    elif isinstance(value, dict) and default is None:
        yield name


def _check_strings(value: Any, converted: Any, name: str = "") -> None:
    """Refuse a string that YAML has parsed as another type, such as `no` as false or `007` as 7."""
    if isinstance(value, dict) and isinstance(converted, dict):
        for key, item in value.items():
            _check_strings(item, converted.get(key), f"{name}.{key}" if name else key)
    elif isinstance(value, list) and isinstance(converted, list | tuple):
        for item, final in zip(value, converted, strict=False):
            _check_strings(item, final, name)
    elif isinstance(converted, str) and not isinstance(value, str):
        raise UserError(f"{name} must be a string, but YAML parses it as {value!r}; put it in quotes")


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
    key, separator, _ = text.partition("=")
    if not (separator and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key.strip())):
        raise UserError(f"an override must be key=value, got {text!r}; example: sampling.width=2048")
    value = text.partition("=")[2]
    if " #" in f" {value}" and value.strip()[:1] not in tuple("'\"[{"):
        text = f"{key}={json.dumps(value.strip(), ensure_ascii=False)}"  # or YAML would take the rest for a comment
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"cannot read the override {text!r}: {str(error).splitlines()[0]}") from error


def _sources(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, DictConfig]]:
    """Load the bases of a file, depth first, then the file itself, each with its path."""
    path = path.resolve()
    if path.suffix.lower() in (".txt", ".jsonl", ".csv", ".parquet", ".gz"):
        raise UserError(f"{path} is a prompt file, not a job file; pass a job file, and prompts.source={path}")
    if path in seen:
        raise UserError(f"{path} is a base of itself; remove it from base")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"job file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the job file {path}: {error}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; a job file has at most a few levels") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must contain a mapping (key: value) at the top level")
    content: Any = OmegaConf.to_container(loaded)
    return _with_bases(content, path, seen)


def _job_file(name: str) -> Path:
    """Resolve a job file: a path, or else the name of a packaged job or preset, such as `demo` or `fast`."""
    file = Path(name)
    return file if file.is_file() or not _is_name(name) else _packaged(name, ("jobs/*.yaml", "configs/*/*.yaml"))


def _base_file(folder: Path, name: str) -> Path:
    """Resolve an entry of `base`: a path relative to `folder`, or else the name of a packaged preset, such as `sd2`."""
    file = folder / expand_user(name, "base")
    return file if file.is_file() or not _is_name(name) else _packaged(name, ("configs/*/*.yaml",))


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[\w-]+", name) is not None


def _packaged(name: str, patterns: Sequence[str]) -> Path:
    """Return the packaged YAML file called `name`; of equal names, that of the first pattern."""
    files: dict[str, Path] = {}
    for folder, _, pattern in (each.partition("/") for each in patterns):
        for file in sorted(resource(folder).glob(pattern)):
            files.setdefault(file.stem, file)
    if name not in files:
        raise UnknownPresetError(f"there is neither a file nor a preset {name!r}{nearest(name, sorted(files))}")
    return files[name]


def _with_bases(content: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, DictConfig]]:
    base, content = content.get("base") or [], {key: value for key, value in content.items() if key != "base"}
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{path}: base must be a path or a list of paths, got {base!r}")
    sources = [source for name in bases for source in _sources(_base_file(path.parent, name), (*seen, path))]
    return [*sources, (path, OmegaConf.create(content))]


def _explain(error: OmegaConfBaseException) -> str:
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    if " is not a subclass of " in first:
        section = first.split(" is not a subclass of ")[1].split(".")[0].removesuffix("Config").lower()
        example = next((name for name in _known_keys(Job()) if f"{section}." in name), None)
        if example is None:
            value = first.partition("value: ")[2]
            return f"an item of backbone.loras is a mapping, such as {{weights: a.safetensors, scale: 1}}, got {value}"
        return f"{section} is a section: set its keys, such as {example}{_preset_hint(section)}"
    if "is not a TupleConfig, ListConfig" in first or "is not a ListConfig" in first:
        return f"{key} is a list: write {key}=[...], such as method.mad.blocks=[up]"
    for internal, kind in (("'ListConfig'", "list"), ("'DictConfig'", "mapping")):
        if internal in first:
            found = re.search(r"(?:Value|string:) '(.*?)'(?: of type|$)", first)
            return f"{key} is one value, not a {kind}" + (f", got {found[1]}" if found else "")
    if key and "not in" in first:
        return f"unknown key {key!r}{_nearest(str(key), _known_keys(Job()))}"
    return f"{key}: {first}" if key else first


SIZE = "sampling.height and sampling.width"
OTHER_NAMES = {
    **dict.fromkeys(("size", "resolution", "image_size"), SIZE),
    **dict.fromkeys(("steps", "num_steps"), "sampling.num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "scale"), "sampling.guidance_scale"),
    **dict.fromkeys(("num_images_per_prompt", "num_samples"), "prompts.samples_per_prompt"),
    **dict.fromkeys(("model", "checkpoint", "pretrained_model_name_or_path"), "backbone.pretrained"),
    **dict.fromkeys(("torch_dtype", "precision"), "backbone.dtype"),
    **dict.fromkeys(("output_dir", "out", "out_dir"), "output.dir"),
    **dict.fromkeys(("gpus", "num_gpus"), "trainer.devices"),
    "tau": "method.mad.steps",
}
"""Keys by the names that other programs have for them."""


def _preset_hint(section: str) -> str:
    names = sorted(file.stem for file in (resource("configs") / section).glob("*.yaml"))
    return f"; to use a preset ({', '.join(names)}), pass its name after the job file" if names else ""


def _nearest(key: str, known: Sequence[str]) -> str:
    """Return the end of an error about an unknown key; also finds keys that have been given without their section."""
    name = key.rpartition(".")[2]
    if name in OTHER_NAMES:
        return f"; set {OTHER_NAMES[name]}"
    hint = nearest(key, known)
    if "did you mean" in hint:
        return hint
    leaf = difflib.get_close_matches(name, [other.rpartition(".")[2] for other in known], n=1)
    close = next((other for other in known if leaf and other.rpartition(".")[2] == leaf[0]), None)
    return f"; did you mean {close!r}?" if close else f"; known: {', '.join(k for k in known if '.' not in k)}"


def _known_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(config):
        keys.append(prefix + item.name)
        value = getattr(config, item.name)
        if is_dataclass(value):
            keys.extend(_known_keys(value, f"{prefix}{item.name}."))
    return keys
