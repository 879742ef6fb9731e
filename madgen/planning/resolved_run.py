"""Everything that commands derive from a job: resolved once, then passed on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from madgen.config.schema import Job
from madgen.dataset import growth, manifest
from madgen.dataset.format import FormatError, Manifest
from madgen.dataset.identity import WeightIds
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan, build_plan
from madgen.dataset.sample_json import sample_settings
from madgen.hub.model_configs import described_by
from madgen.hub.weights import MissingWeightsError, ModelFiles, resolve_dtype
from madgen.types import Shard, shard_name


@dataclass(frozen=True)
class ResolvedRun:
    """A job with its plan, its directory and its model files."""

    job: Job
    plan: Plan
    directory: DatasetDir
    files: ModelFiles
    """Location of the backbone."""
    dtype: str
    """Precision of the backbone; `auto` until the device is known."""
    device: str | None = None
    """Device type that samples, such as `cuda`; None: not known yet."""
    cannot_grow: str | None = None
    """Why the prompts cannot extend those of the dataset in `directory`; None if they can, or are the same."""

    @classmethod
    def of(cls, job: Job, plan: Plan | None = None) -> ResolvedRun:
        """Resolve a job, reading its prompts unless their `plan` is given. Loads no weights, imports no torch."""
        directory, backbone = DatasetDir(job.output_dir), job.backbone
        files = ModelFiles.of(backbone.pretrained, backbone.revision, backbone.config, backbone.variant)
        plan, cannot_grow = plan or build_plan(job, directory.plans), None
        try:
            joined = growth.join(plan, directory, extend=job.output.resume != "never")
            plan = plan if job.output.resume != "extend" and joined.is_extension else joined
        except growth.CannotGrowError as error:
            cannot_grow = str(error)
        return cls(job, plan, directory, files, backbone.dtype, cannot_grow=cannot_grow)

    def on(self, device: str) -> ResolvedRun:
        """Return the run on a type of device, which determines an `auto` dtype."""
        return replace(self, device=device, dtype=resolve_dtype(self.job.backbone.dtype, device))

    @cached_property
    def shard_names(self) -> list[str]:
        """Names of the planned shards, by index."""
        return [shard_name(self.plan.name, index) for index in range(self.plan.shard_count)]

    def is_complete(self) -> bool:
        """Return whether every planned shard is done."""
        return set(self.shard_names) <= self.directory.done()

    @property
    def weights_are_local(self) -> bool:
        """True if everything that identifies the weights is on this machine."""
        try:
            WeightIds.of(self.job, described_by(self.files))
        except MissingWeightsError:
            return False
        return True

    @cached_property
    def manifest(self) -> Manifest:
        """Content of `dataset.json`. Raises UserError unless the weights are on this machine."""
        return manifest.build(self.job, self.plan, self.dtype, described_by(self.files))

    @cached_property
    def _sample_settings(self) -> dict[str, Any]:
        return sample_settings(self.job, self.manifest)

    def sample_settings(self, shard: Shard) -> dict[str, Any]:
        """Return the part of a sample's JSON that all samples of a shard share."""
        return {**self._sample_settings, "fingerprint": self.manifest.shard_fingerprint(shard.index)}

    @property
    def added(self) -> int:
        """Number of samples that the dataset in `directory` lacks in its plan, and that this run adds to it."""
        return len(self.plan.stages[-1]) if self.plan.is_extension else 0

    def check_directory(self) -> None:
        """Raise UserError if `output.dir` holds another job's dataset, as far as is known before weights are loaded."""
        known = self.directory.manifest.exists() and (self.job.retry is not None or self.weights_are_local)
        try:
            content = self.in_recorded_dtype().manifest if known else None
        except FormatError:
            content = None
        manifest.check_directory(self.directory, content, self.job.output.resume, self.cannot_grow)

    def in_recorded_dtype(self) -> ResolvedRun:
        """Return the run in the precision of its dataset, where the device that would sample does not matter.

        Raises FormatError if `dataset.json` is damaged and the precision is not known otherwise.
        """
        if self.device is not None or self.dtype != "auto":
            return self
        return replace(self, dtype=self.directory.read_manifest().setting("identity.backbone.dtype", str))
