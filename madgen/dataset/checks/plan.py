"""Compare the samples of all shards with the plan, of which `dataset.json` has checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from madgen.dataset.checks.shard import PlannedSample
from madgen.dataset.format import Manifest, Portion, portion_at
from madgen.dataset.records import to_json
from madgen.prompts.digests import PromptsDigest
from madgen.prompts.rows import rest_identity
from madgen.types import Prompt
from madgen.utils.arrow import string_array
from madgen.utils.seeding import sample_seed

Known = dict[str, tuple[int | None, bytes | None]]
"""For each prompt: the seed that the prompt file gives it, and a hash of its `PlannedSample.prompt`, if known."""


class PlanCheck:
    """Compare keys, seeds, prompts and sizes with the plan, shard after shard."""

    def __init__(self, manifest: Manifest):
        self._manifest, self._keys = manifest, hashlib.sha256()
        self._portions = manifest.portions()
        known: dict[int, Known] = {}  # by source
        self._place = 0
        self._checks = [_PromptsCheck(item, known.setdefault(id(item.source), {})) for item in self._portions]

    def add(self, index: int, samples: Iterable[PlannedSample], keys: Iterable[str]) -> list[str]:
        """Append the samples of the shard at `index`; return a problem for each that contradicts its prompt's first."""
        self._keys.update("".join(f"{key}\n" for key in keys).encode("utf-8", "surrogateescape"))
        place = portion_at(self._portions, index)
        if place != self._place:  # shards are added in order
            self._checks[self._place].close()
            self._place = place
        return self._checks[place].add(samples)

    def finish(self) -> tuple[bool, bool]:
        """Return whether the keys are the planned ones, and whether prompts, sizes and seeds may be."""
        same = [check.finish() for check in self._checks]
        return self._keys.hexdigest() == self._manifest.plan.keys_sha256, all(same)


class _PromptsCheck:
    """Compare the seeds and prompts of a portion with its plan.

    `known` holds the prompts of earlier generations, of which a later one may have more samples.
    """

    def __init__(self, portion: Portion, known: Known):
        manifest = portion.source
        self._job_seed = manifest.value("identity.prompts.seed")
        # the digest of datasets without embedded metadata was computed in another way
        embeds = manifest.value("identity.output.embedded") == 1
        self._planned = portion.generation.prompts_digest if portion.generation is not None and embeds else None
        self._digest = PromptsDigest() if self._planned is not None else None
        generations = manifest.generations or ()
        self._remembers = len({generation.samples_per_prompt for generation in generations}) > 1
        self._known = known
        self._prompt: list[PlannedSample] = []
        """Samples of the last prompt, which may go on in the next shard."""

    def add(self, samples: Iterable[PlannedSample]) -> list[str]:
        """Append the samples of the next shard; return their problems."""
        problems: list[str] = []
        for sample in samples:
            if self._prompt and self._prompt[0].prompt_id != sample.prompt_id:
                self.close()
            self._prompt.append(sample)
            problems += self._check_sample(sample)
        return problems

    def _check_sample(self, sample: PlannedSample) -> list[str]:
        """Compare with the first sample of the prompt, on whose seed the others depend if the prompt file gives it."""
        first, key = self._prompt[0], f"{sample.prompt_id}-{sample.sample_index:04d}"
        given, digest = self._about(first)
        if None not in (digest, sample.prompt) and digest != _mark(sample.prompt):
            return [f"{key}: its prompt or size is not that of the first sample of its prompt"]
        is_later = first.sample_index != 0
        if sample.sample_index == 0 or type(self._job_seed) is not int or sample.seed is None:
            return []
        if sample.prompt_id not in self._known if is_later else first.seed is None:
            return []
        seed = sample_seed(self._job_seed if given is None else given, sample.prompt_id, sample.sample_index)
        return [] if sample.seed == seed else [f"{key}: its seed is {sample.seed}, the plan's {seed}"]

    def _about(self, first: PlannedSample) -> tuple[int | None, bytes | None]:
        """Return what all samples of a prompt share, from its first one or from an earlier generation."""
        if first.sample_index != 0:
            return self._known.get(first.prompt_id, (None, None))
        return self._given_seed(first), None if first.prompt is None else _mark(first.prompt)

    def _given_seed(self, first: PlannedSample) -> int | None:
        """Return the seed in the prompt file; None if it has none, or is not known."""
        if first.seed is None or type(self._job_seed) is not int:
            return None
        return None if first.seed == sample_seed(self._job_seed, first.prompt_id, 0) else first.seed

    def close(self) -> None:
        """Append the last prompt to the digest, which is dropped if not everything about the prompt is known."""
        samples, self._prompt = self._prompt, []
        if not samples or (samples[0].sample_index and samples[0].prompt_id in self._known):
            return  # further samples of a prompt of an earlier generation
        first, seed = samples[0], self._given_seed(samples[0])
        known = next((sample.prompt for sample in samples if sample.prompt is not None), None)
        if self._remembers and first.seed is not None and not first.sample_index:
            self._known[first.prompt_id] = seed, None if known is None else _mark(known)
        if self._digest is None:
            return
        readable = known is not None and all(isinstance(known[name], str) for name in ("prompt", "negative_prompt"))
        if known is None or not readable or first.sample_index or first.seed is None or type(self._job_seed) is not int:
            self._digest = None
            return
        size, negative = (known["height"], known["width"]), known["negative_prompt"]
        prompt = Prompt(known["prompt_id"], known["prompt"], negative, *size, seed, columns=known["columns"] or {})
        self._digest.update(string_array([prompt.id], pa.string()), string_array([prompt.text], pa.large_string()))
        self._digest.update_rests([(rest_identity(prompt), 1)])

    def finish(self) -> bool:
        """Return whether prompts, sizes and seeds may be the planned ones."""
        self.close()
        return self._digest is None or self._digest.hexdigest() == self._planned


def _mark(prompt: dict[str, Any] | None) -> bytes:
    return hashlib.blake2b(to_json(prompt), digest_size=16).digest()
