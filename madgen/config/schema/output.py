"""`output`, `safety`, `scores` and `quarantine`: what is written for each sample."""

from __future__ import annotations

import re
from dataclasses import dataclass

from madgen.config.schema.checks import check, check_one_of, check_url
from madgen.utils.validation import nearest

PIXEL_SCORES = ("seam", "wrap", "coherence")
"""Scores computed from pixels, see `madgen.images.scores`."""


SCORES = (*PIXEL_SCORES, "clip")
"""Keys that may occur under `scores` in a sample's JSON."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The dataset on disk."""

    dir: str | None = None
    """Directory of the dataset, relative to the current directory; null is `out/<name>`."""
    samples_per_shard: int = 128
    """Number of samples in a tar file, > 0."""
    format: str = "png"
    """Image format: `png` (lossless), `jpg` (or `jpeg`) or `webp`."""
    quality: int = 95
    """Quality of `jpg` and `webp`, 1..100."""
    upload: str | None = None
    """URL of any file system that fsspec supports (`s3://bucket/folder`, `gs://`, `hf://datasets/owner/name`,
    `file://`): finished shards are uploaded while others are generated. Credentials come from the environment, never
    from the job. null: no upload."""
    key_prefix: str = ""
    """Start of every sample's key, at most 32 of `[A-Za-z0-9_-]`, so that datasets of the same prompts can be combined.
    Seeds and pixels do not depend on it."""
    resume: str = "if_same"
    """`if_same` resumes a dataset of the same job; `extend` also adds prompts and samples that a finished or unfinished
    dataset does not have, in shards behind the existing ones; `never` refuses a directory that contains a dataset."""

    def __post_init__(self) -> None:
        check(self.samples_per_shard > 0, f"output.samples_per_shard must be > 0, got {self.samples_per_shard}")
        if self.format == "jpeg":
            object.__setattr__(self, "format", "jpg")
        check_one_of("output.format", self.format, ("png", "jpg", "webp"))
        check(1 <= self.quality <= 100, f"output.quality must be in 1..100, got {self.quality}")
        check(
            self.dir is None or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", self.dir),
            f"output.dir must be a local directory, got {self.dir}; set "
            f"output.upload={re.sub(':/+', '://', self.dir or '')} to upload to it",
        )
        if self.upload is not None:
            check_url("output.upload", self.upload)
        check(
            re.fullmatch(r"[A-Za-z0-9_-]{0,32}", self.key_prefix) is not None,
            f"output.key_prefix must be at most 32 of [A-Za-z0-9_-], got {self.key_prefix!r}",
        )
        check_one_of("output.resume", self.resume, ("if_same", "extend", "never"))


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """A safety checker, applied to square crops as large as a view."""

    checker: str | None = None
    """Folder or Hugging Face Hub id of a diffusers `StableDiffusionSafetyChecker` with its feature extractor, or of a
    pipeline that contains them; null: no checker."""
    action: str = "keep"
    """Handling of flagged crops: `keep` only records them, `blur` blurs them, `drop` quarantines the sample. `blur`
    and `drop` need a checker."""

    def __post_init__(self) -> None:
        check_one_of("safety.action", self.action, ("keep", "blur", "drop"))
        check(self.checker != "", "safety.checker is empty; set it to null to disable the checker")
        check(
            self.checker is not None or self.action == "keep",
            f"safety.action={self.action} has no effect without a checker; set safety.checker",
        )


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores of each sample, recorded in its JSON, the sidecars and `index.parquet`, to select by (`madgen filter`)."""

    enabled: tuple[str, ...] | None = None
    """Scores computed from pixels: `seam` (gradient at the borders of views relative to that beside them; 1 is
    seamless), `wrap` (the same where a looped panorama closes) and `coherence` (similarity of crops, 0..1). null: all
    that apply to the job, at almost no cost; []: none."""
    clip: str | None = None
    """Folder or Hugging Face Hub id of a CLIP model (safetensors) for the score `clip`: 100 times the cosine of prompt
    and image, at least 0, averaged over square crops. Prompts of regions are ignored, and prompts are truncated to the
    model's maximum length. null: no such score."""

    def __post_init__(self) -> None:
        for name in self.enabled or ():
            check(name != "clip", "scores.enabled: clip needs a model; set scores.clip=FOLDER_OR_ID instead")
            check(name in PIXEL_SCORES, f"scores.enabled: unknown score {name!r}{nearest(name, PIXEL_SCORES)}")
        check(len(set(self.enabled or ())) == len(self.enabled or ()), "scores.enabled names a score twice")
        check(self.clip != "", "scores.clip is empty; set it to null to disable the score")


@dataclass(frozen=True, kw_only=True)
class QuarantineConfig:
    """Limit of failed samples beyond which a run stops, since the job or the machine is probably broken."""

    max_share: float = 0.2
    """Stop if more than this share of the last `window` samples failed, 0..1; 1: never."""
    window: int = 50
    """Number of most recent samples to consider, >= 1."""

    def __post_init__(self) -> None:
        check(0 <= self.max_share <= 1, f"quarantine.max_share must be in 0..1, got {self.max_share}; 1 disables it")
        check(self.window >= 1, f"quarantine.window must be >= 1 sample, got {self.window}")
