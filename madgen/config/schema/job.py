"""The whole job."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from madgen.config.field_types import check_fields
from madgen.config.schema.backbone import UNETS, BackboneConfig
from madgen.config.schema.checks import check, check_recordable
from madgen.config.schema.method import MethodConfig
from madgen.config.schema.output import PIXEL_SCORES, OutputConfig, QuarantineConfig, SafetyConfig, ScoresConfig
from madgen.config.schema.prompts import PICTURE_FIELDS, PromptsConfig
from madgen.config.schema.run import MonitorConfig, TrainerConfig
from madgen.config.schema.sampling import SamplingConfig
from madgen.utils.validation import expand_user


def require_job(value: Any) -> Job:
    """Return `value` if it is a Job; raise UserError otherwise, for example for the path of a job file."""
    check(isinstance(value, Job), f"job must be a madgen.Job, see madgen.load_job(path), got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job: everything that determines one dataset."""

    name: str = "job"
    """Name of the dataset and prefix of its shards, 1..96 of `[A-Za-z0-9_-]`. If a job file does not set it, it is the
    stem of the (first) job file."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    retry: str | None = None
    """`quarantined` generates samples again that failed in earlier runs; null skips them."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "method", self.method.with_steps(self.denoising_steps))
        check_recordable(self.as_dict())
        check(self.retry in (None, "quarantined"), f"retry must be quarantined or null, got {self.retry!r}")
        valid = all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name)
        check(valid and 0 < len(self.name) <= 96, f"name must match [A-Za-z0-9_-]{{1,96}}, got {self.name!r}")
        first, steps = self.method.views.overlap_from, self.denoising_steps
        check(
            first is None or first < steps,
            f"method.views.overlap_from={first} must be < {self.sampling.described(steps)}; set it to null",
        )
        self.method.merge.check_steps(self.method.mad.merged_steps, steps, self.sampling)
        check(
            self.sampling.guidance_steps is None or not self.method.sync.weight,
            "method.sync needs guidance in every step; set sampling.guidance_steps to null",
        )
        for name, setting in PICTURE_FIELDS.items():
            used = name in self.picture_columns or (name == "place" and "image" in self.picture_columns)
            check(used or name not in self.prompts.columns, f"prompts.columns.{name} has no effect; set {setting}")
        check(
            not self.prompts.allow_picture_urls or self.picture_columns != (),
            f"prompts.allow_picture_urls={self.prompts.allow_picture_urls} has no effect: the job reads no pictures; "
            f"set {', '.join(dict.fromkeys(PICTURE_FIELDS.values()))}, or remove it",
        )
        for name, reason in self._inapplicable_scores.items():
            check(
                name not in (self.scores.enabled or ()),
                f"scores.enabled: {name} is undefined {reason}; remove it",
            )

    @property
    def _inapplicable_scores(self) -> dict[str, str]:
        """Pixel scores that are undefined for this job, with the reason."""
        seam = {"seam": "with layout=whole, which has no borders"} if self.method.views.layout == "whole" else {}
        return seam if self.sampling.loop else {**seam, "wrap": "without sampling.loop=true"}

    @property
    def pixel_scores(self) -> tuple[str, ...]:
        """Pixel scores that are recorded, in the order of `PIXEL_SCORES`."""
        enabled = PIXEL_SCORES if self.scores.enabled is None else self.scores.enabled
        return tuple(name for name in PIXEL_SCORES if name in enabled and name not in self._inapplicable_scores)

    @property
    def denoising_steps(self) -> int:
        """Number of denoising steps that run, fewer than `num_inference_steps` if sampling starts from pictures."""
        return self.sampling.denoising_steps(flow=self.backbone.name not in UNETS)

    @property
    def picture_columns(self) -> tuple[str, ...]:
        """Columns of prompts that name pictures of this job, the required ones first."""
        start = ("image", "mask") if self.sampling.init.strength is not None else ()
        adapters = {"control": self.backbone.controlnet.weights, "style": self.backbone.ip_adapter.weights}
        return (*start, *(column for column, weights in adapters.items() if weights is not None))

    @property
    def output_dir(self) -> Path:
        """Directory of the dataset."""
        return expand_user(self.output.dir or f"out/{self.name}", "output.dir")

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved job as it is recorded in `dataset.json`."""
        resolved = asdict(self)
        del resolved["method"]["mad"]["share"]  # converted to steps
        return resolved
