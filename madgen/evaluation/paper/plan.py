"""Load the files in `jobs/paper/`: a job, the settings to compare, the metrics, and the table or figure to draw.

    title: Table 1, ...
    job: {...}                      # as in a job file, including `base`; shared by all settings
    settings: [{label: ..., base: [...], method: ..., ...}]       # one row, image or line each, with its own job keys
    vary: {sampling.width: [1024, 2048]}     # optional: run every setting with each of these values
    metrics: [fid, kid, runtime]    # none for pictures
    draw: {kind: table | pictures | lines | tsne, ...}
    references: 500                 # square reference images per prompt
    pairs: 1000                     # pairs of square images per prompt, for `squares` settings
    extractor: paper
    demo: {...}                     # --demo: keys that replace those above, for the demo backbone; takes minutes
    quick: {...}                    # --quick: on top of `demo`, for tests; takes seconds

A setting may have a `group` (a heading in a table). `squares: true` makes it the reference of its group, one half
against the other, as in the paper's rows of plain Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from madgen.config.loader import job_of
from madgen.config.schema import Job
from madgen.dataset.layout import DatasetDir
from madgen.evaluation.partial_results import digest
from madgen.metrics import METRICS
from madgen.utils.errors import UserError
from madgen.utils.validation import nearest

QUICK = ", minimal configuration as a smoke test"
RUNTIME = "runtime"
KINDS = ("table", "pictures", "lines", "tsne")
KEYS = ("title", "job", "settings", "vary", "metrics", "draw", "references", "pairs", "extractor", "pool")
SETTING_KEYS = ("label", "group", "squares", "base", *Job().as_dict())
NOT_AFFECTING_IMAGES = ("name", "output", "monitor", "trainer", "retry", "quarantine")


@dataclass(frozen=True)
class Setting:
    """One dataset of a table or figure."""

    label: str
    group: str
    job: Job
    squares: bool = False
    value: Any = None
    """Value of the varied key."""

    @property
    def name(self) -> str:
        """Name of the dataset's folder, shared by all tables that contain the same job."""
        content = self.job.as_dict()
        source = Path(self.job.prompts.source)
        content["prompts"]["source"] = source.read_text(encoding="utf-8") if source.is_file() else str(source)
        del content["sampling"]["batch_size"]
        content = {key: value for key, value in content.items() if key not in NOT_AFFECTING_IMAGES}
        method, size = self.job.method, f"{self.job.sampling.height}x{self.job.sampling.width}"
        summary = f"{method.views.layout}-tau{method.mad.steps}" + ("-sync" if method.sync.weight else "")
        return f"{summary}-{size}-{digest(content)}"


@dataclass(frozen=True)
class Paper:
    """A table or figure and its jobs."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    metrics: tuple[str, ...]
    draw: dict[str, Any]
    references: int
    pairs: int
    extractor: str
    pool: str
    varied: str | None = None
    """The varied key of the job."""


def load_paper(
    path: Path, demo: bool = False, quick: bool = False, overrides: Sequence[str] = (), extractor: str | None = None
) -> Paper:
    """Load a file and its jobs; raise UserError if it does not have the format above."""
    if reserved := [text for text in overrides if text.startswith(("output.", "name="))]:
        raise UserError(f"{reserved[0]}: madgen paper sets the name and output of its datasets; -o names the folder")
    content = _read(path)
    variants = {key: content.pop(key, None) for key in ("demo", "quick")}
    jobs = [content.get("job") or {}]
    for name in ("demo", "quick")[: 2 if quick else 1 if demo else 0]:
        if (variant := variants[name]) is None:
            problem = f"has no variant {name!r}" if "settings" in content else "has no settings, so it is not a table"
            raise UserError(f"{path} {problem}; see jobs/paper for examples")
        _check_mapping(variant, name, path)
        _check_mapping(variant.get("job") or {}, f"{name}.job", path)
        earlier = jobs if name == "quick" else []  # the demo's job replaces the real one
        jobs = [*earlier, variant.get("job") or {}]
        content |= variant
    _check(content, path)
    content["job"] = jobs
    settings = [setting for entry in content["settings"] for setting in _settings(entry, content, path, overrides)]
    names = [(setting.group, setting.label, setting.value) for setting in settings]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: two settings have the same label")
    return Paper(
        name=path.stem,
        title=content.get("title", path.stem) + (QUICK if quick else ""),
        settings=tuple(settings),
        metrics=tuple(content.get("metrics") or ()),
        draw=content["draw"],
        references=content.get("references", 500),
        pairs=content.get("pairs", 1000),
        extractor=extractor or content.get("extractor", "paper"),
        pool=content.get("pool", "prompts"),
        varied=next(iter(content.get("vary") or {}), None),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; jobs/paper has examples") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values at its top level")
    return content


def _check_mapping(value: Any, key: str, path: Path) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must hold keys and values, got {value!r}")


def _check(content: Mapping[str, Any], path: Path) -> None:
    _check_mapping(content.get("job") or {}, "job", path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, (*KEYS, 'demo', 'quick'))}")
    if not isinstance(content.get("settings"), list) or not all(isinstance(e, dict) for e in content["settings"]):
        raise UserError(f"{path}: settings must be a list of {{label: ..., ...}}")
    draw = content.get("draw")
    if not isinstance(draw, dict) or draw.get("kind") not in KINDS:
        raise UserError(f"{path}: draw.kind must be one of {', '.join(KINDS)}, got {draw!r}")
    if not isinstance(samples := draw.get("samples", 1), int) or samples < 1:
        raise UserError(f"{path}: draw.samples must be an integer >= 1, got {samples!r}")
    for name in content.get("metrics") or ():
        if name not in (*METRICS, RUNTIME):
            raise UserError(f"{path}: unknown metric {name!r}{nearest(name, (*METRICS, RUNTIME))}")
    vary = content.get("vary") or {}
    if not isinstance(vary, dict) or len(vary) > 1 or not all(isinstance(values, list) for values in vary.values()):
        raise UserError(f"{path}: vary must be one key of the job with a list of values, got {vary!r}")
    for key in ("references", "pairs"):
        if not isinstance(content.get(key, 1), int) or content.get(key, 1) < 1:
            raise UserError(f"{path}: {key} must be an integer >= 1, got {content[key]!r}")
    if (pool := content.get("pool", "prompts")) not in ("prompts", "dataset"):
        raise UserError(f"{path}: pool must be prompts or dataset, got {pool!r}")


def _settings(
    entry: Mapping[str, Any], content: Mapping[str, Any], path: Path, overrides: Sequence[str]
) -> list[Setting]:
    """Load a setting, one for each value of the varied key; its own job keys follow those of `content`."""
    label = entry.get("label")
    if not isinstance(label, str):
        raise UserError(f"{path}: every setting needs a label (a string): {dict(entry)}")
    for key in entry:
        if key not in SETTING_KEYS:
            raise UserError(f"{path}: {label}: unknown key {key!r}{nearest(key, SETTING_KEYS)}")
    own = {key: value for key, value in entry.items() if key not in ("label", "group", "squares")}
    layers = (*content["job"], own, {"monitor": {"wandb": {"mode": "disabled"}}})
    setting = Setting(
        label, str(entry.get("group", "")), job_of(layers, "paper", path, overrides), bool(entry.get("squares", False))
    )
    if setting.squares or not content.get("vary"):
        return [setting]
    key, values = next(iter(content["vary"].items()))
    jobs = [job_of(layers, "paper", path, [*overrides, f"{key}={value}"]) for value in values]
    return [replace(setting, job=job, value=value) for job, value in zip(jobs, values, strict=True)]


@dataclass
class Made:
    """A setting with its dataset and report."""

    setting: Setting
    directory: DatasetDir
    report: dict[str, Any] | None = None
    reference: DatasetDir | None = None
    extra: dict[str, float] = field(default_factory=dict)
