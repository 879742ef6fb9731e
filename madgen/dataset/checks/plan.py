"""Compare the samples of all shards with the plan, of which `dataset.json` has checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pyarrow as pa

from madgen.dataset.checks.shard import PlannedSample
from madgen.dataset.format import Manifest
from madgen.prompts.digests import PromptsDigest
from madgen.prompts.rows import rest_identity
from madgen.types import Prompt
from madgen.utils.seeding import sample_seed


class PlanCheck:
    """Compare keys, seeds, prompts and sizes with the plan, shard after shard."""

    def __init__(self, manifest: Manifest):
        self._manifest, self._keys = manifest, hashlib.sha256()
        prompts = manifest.identity.get("prompts")
        self._prompts: dict[str, Any] = prompts if isinstance(prompts, dict) else {}
        output = manifest.identity.get("output")
        # the digest of datasets without embedded metadata was computed in another way
        embeds = isinstance(output, dict) and output.get("embedded") == 1 and manifest.filtered is None
        self._digest = PromptsDigest() if embeds and type(self._prompts.get("digest")) is str else None
        self._prompt: list[PlannedSample] = []
        """Samples of the last prompt, which may go on in the next shard."""

    def add(self, samples: Iterable[PlannedSample], keys: Iterable[str]) -> list[str]:
        """Append the samples of the next shard; return a problem for each that contradicts its prompt's first one."""
        problems: list[str] = []
        self._keys.update("".join(f"{key}\n" for key in keys).encode("utf-8", "surrogateescape"))
        for prompt_id, group in groupby(samples, lambda sample: sample.prompt_id):
            if self._prompt and self._prompt[0].prompt_id != prompt_id:
                self._close()
            for sample in group:
                self._prompt.append(sample)
                problems += self._check_sample(sample)
        return problems

    def _check_sample(self, sample: PlannedSample) -> list[str]:
        """Compare with the first sample of the prompt, on whose seed the others depend if the prompt file gives it."""
        first, job_seed = self._prompt[0], self._prompts.get("seed")
        key = f"{sample.prompt_id}-{sample.sample_index:04d}"
        if None not in (first.prompt, sample.prompt) and first.prompt != sample.prompt:
            return [f"{key}: its prompt or size is not that of the first sample of its prompt"]
        if sample.sample_index == 0 or first.sample_index != 0 or type(job_seed) is not int:
            return []
        if first.seed is None or sample.seed is None:
            return []
        given = self._given_seed(first, job_seed)
        seed = sample_seed(job_seed if given is None else given, sample.prompt_id, sample.sample_index)
        return [] if sample.seed == seed else [f"{key}: its seed is {sample.seed}, the plan's {seed}"]

    @staticmethod
    def _given_seed(first: PlannedSample, job_seed: int) -> int | None:
        """Return the seed in the prompt file; None if it has none."""
        return None if first.seed == sample_seed(job_seed, first.prompt_id, 0) else first.seed

    def _close(self) -> None:
        """Append the last prompt to the digest, which is given up if not everything about the prompt is known."""
        samples, self._prompt = self._prompt, []
        if self._digest is None or not samples:
            return
        known = next((sample.prompt for sample in samples if sample.prompt is not None), None)
        job_seed = self._prompts.get("seed")
        readable = known is not None and all(isinstance(known[name], str) for name in ("prompt", "negative_prompt"))
        first = samples[0]
        if known is None or not readable or first.sample_index or first.seed is None or type(job_seed) is not int:
            self._digest = None
            return
        size, seed = (known["height"], known["width"]), self._given_seed(first, job_seed)
        prompt = Prompt(
            known["prompt_id"], known["prompt"], known["negative_prompt"], *size, seed, columns=known["columns"] or {}
        )
        self._digest.update(pa.array([prompt.id]), pa.array([prompt.text], pa.large_string()))
        self._digest.update_rests([(rest_identity(prompt), 1)])

    def finish(self) -> tuple[bool, bool]:
        """Return whether the keys are the planned ones, and whether prompts, sizes and seeds may be."""
        self._close()
        same = self._digest is None or self._digest.hexdigest() == self._prompts["digest"]
        return self._keys.hexdigest() == self._manifest.plan.keys_sha256, same
