"""The files in `jobs/paper/`: a job, what varies, what is measured and what is drawn.

    title: what it shows
    job: {...}                      # as in a job file, `base` too; for all settings
    settings: [{label: ..., base: [...], method: ..., ...}]       # a row, line or picture each; job keys of its own
    vary: {sampling.width: [1024, 2048]}     # optional: every setting at each of these values
    metrics: [fid, kid, runtime]    # none for pictures
    draw: {kind: table | pictures | lines | tsne, ...}
    references: 500                 # squares a prompt
    pairs: 1000                     # of squares a prompt, where these are a row
    extractor: paper
    demo: {...}                     # keys that replace these with --demo: the same with the demo backbone, in minutes
    quick: {...}                    # on top of `demo`, with --quick: in seconds, for tests

A setting may have `group` (a heading in a table), and `squares: true`: the reference of its group itself, one half
against the other, as the paper's rows of plain Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from madgen.config.loader import job_of
from madgen.config.schema import Job, nearest
from madgen.dataset.layout import DatasetDir
from madgen.evaluation.partial_results import digest
from madgen.metrics import METRICS
from madgen.utils.errors import UserError

QUICK = ", in the least size: shows that it works, and no more"
RUNTIME = "runtime"
KINDS = ("table", "pictures", "lines", "tsne")
KEYS = ("title", "job", "settings", "vary", "metrics", "draw", "references", "pairs", "extractor", "pool")
OF_A_SETTING = ("label", "group", "squares", "base")
NOT_OF_PICTURES = ("name", "output", "monitor", "trainer", "retry", "quarantine")
JOB_KEYS = tuple(Job().as_dict())


@dataclass(frozen=True)
class Setting:
    """One dataset of a table or figure."""

    label: str
    group: str
    job: Job
    squares: bool = False
    value: Any = None
    """Of what varies."""

    @property
    def name(self) -> str:
        """Of its folder: datasets of one job are one, in whatever table they stand."""
        asked = self.job.as_dict()
        source = Path(self.job.prompts.source)
        asked["prompts"]["source"] = source.read_text() if source.is_file() else str(source)
        del asked["sampling"]["batch_size"]
        what = {key: value for key, value in asked.items() if key not in NOT_OF_PICTURES}
        method, size = self.job.method, f"{self.job.sampling.height}x{self.job.sampling.width}"
        how = f"{method.views.layout}-tau{method.mad.steps}" + ("-sync" if method.sync.weight else "")
        return f"{how}-{size}-{digest(what)}"


@dataclass(frozen=True)
class Paper:
    """A table or figure, planned."""

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
    """The key of the job that varies."""


def load_paper(
    path: Path, demo: bool = False, quick: bool = False, overrides: Sequence[str] = (), extractor: str | None = None
) -> Paper:
    """Reads a file and plans its jobs; UserError for what is not as above."""
    taken = [text for text in overrides if text.startswith(("output.", "name="))]
    if taken:
        raise UserError(f"{taken[0]}: where the datasets of a paper file go, and how, is its own; -o names the folder")
    content = _read(path)
    shown = {key: content.pop(key, None) for key in ("demo", "quick")}
    for name in ("demo", "quick")[: 2 if quick else 1 if demo else 0]:
        if shown[name] is None:
            what = f"has no variant {name!r}" if "settings" in content else "is no table or figure: it has no settings"
            raise UserError(f"{path} {what}; jobs/paper has some that do")
        above = shown[name]
        below = content.get("job") if name == "quick" else {}  # a demo's job has nothing of the real one's
        content = {**content, **above, "job": _deep(below or {}, above.get("job") or {})}
    _check(content, path)
    settings = [setting for entry in content["settings"] for setting in _settings(entry, content, path, overrides)]
    names = [(setting.group, setting.label, setting.value) for setting in settings]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: two settings have one label")
    return Paper(
        name=path.stem,
        title=content.get("title", path.stem) + (QUICK if quick else ""),
        settings=tuple(settings),
        metrics=tuple(content.get("metrics") or ()),
        draw=content["draw"],
        references=int(content.get("references", 500)),
        pairs=int(content.get("pairs", 1000)),
        extractor=extractor or content.get("extractor", "paper"),
        pool=content.get("pool", "prompts"),
        varied=next(iter(content.get("vary") or {}), None),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values at its top level")
    return content


def _deep(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        inner = found.get(key)
        found[key] = _deep(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def _check(content: Mapping[str, Any], path: Path) -> None:
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, (*KEYS, 'demo', 'quick'))}")
    if not isinstance(content.get("settings"), list) or not all(isinstance(e, dict) for e in content["settings"]):
        raise UserError(f"{path}: settings must be a list of {{label: ..., ...}}")
    draw = content.get("draw")
    if not isinstance(draw, dict) or draw.get("kind") not in KINDS:
        raise UserError(f"{path}: draw.kind must be one of {', '.join(KINDS)}, got {draw!r}")
    for name in content.get("metrics") or ():
        if name not in (*METRICS, RUNTIME):
            raise UserError(f"{path}: unknown metric {name!r}{nearest(name, (*METRICS, RUNTIME))}")
    if len(content.get("vary") or {}) > 1:
        raise UserError(f"{path}: vary takes one key of the job, got {', '.join(content['vary'])}")


def _settings(
    entry: Mapping[str, Any], content: Mapping[str, Any], path: Path, overrides: Sequence[str]
) -> list[Setting]:
    label = entry.get("label")
    if not isinstance(label, str):
        raise UserError(f"{path}: a setting has no label (a text): {dict(entry)}")
    own = {key: value for key, value in entry.items() if key in JOB_KEYS or key == "base"}
    for key in entry:
        if key not in (*OF_A_SETTING, *JOB_KEYS):
            raise UserError(f"{path}: {label}: unknown key {key!r}{nearest(key, (*OF_A_SETTING, *JOB_KEYS))}")
    common, quiet = content.get("job") or {}, {"monitor": {"wandb": {"mode": "disabled"}}}
    job = job_of((common, own, quiet), "paper", path, overrides)
    plain = Setting(label, str(entry.get("group", "")), job, bool(entry.get("squares", False)))
    if plain.squares or not content.get("vary"):
        return [plain]
    key, values = next(iter(content["vary"].items()))
    found = []
    for value in values:
        varied = job_of((common, own, quiet), "paper", path, [*overrides, f"{key}={value}"])
        found.append(replace(plain, job=varied, value=value))
    return found


@dataclass
class Made:
    """A setting with what became of it."""

    setting: Setting
    directory: DatasetDir
    report: dict[str, Any] | None = None
    reference: DatasetDir | None = None
    extra: dict[str, float] = field(default_factory=dict)
