"""Choose the pairs of a study: samples that two datasets share, and controls."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path

from madgen.dataset.format import Manifest, SampleEntry, prompt_id
from madgen.dataset.layout import DatasetDir
from madgen.user_study.questions import QUESTIONS, check_questions
from madgen.utils.errors import UserError
from madgen.utils.seeding import derived_seed

MAX_PATCHWORK_IMAGES = 4


@dataclass(frozen=True)
class Design:
    """Options of a study."""

    pairs: int = 20
    """Maximum number of pairs for each two datasets, spread over prompts."""
    controls: int = 6
    """Number of questions with a known answer, 6 in the paper."""
    questions: tuple[str, ...] = ("both",)
    """Asked about every pair."""
    ties: bool = False
    """Offer the answer "no difference"."""
    seed: int = 0
    """Seed for the choice of pairs and controls. The page draws order and sides for each participant."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise UserError(f"--pairs must be >= 1 pair of panoramas for each two datasets, got {self.pairs}")
        if self.controls < 0:
            raise UserError(f"--controls must be >= 0 questions, got {self.controls}; 0 disables the check")
        if not self.questions:
            raise UserError(f"--question is empty; known: {', '.join(QUESTIONS)}")
        check_questions(self.questions)


@dataclass(frozen=True)
class Source:
    """A dataset of the study."""

    name: str
    directory: DatasetDir
    manifest: Manifest
    samples: dict[str, SampleEntry]
    """By key."""


@dataclass(frozen=True)
class StudyImage:
    """An image to show: a sample as it is (`plain`), `blurred`, or a `patchwork` of several samples."""

    source: int
    key: str
    kind: str = "plain"
    others: tuple[str, ...] = ()
    """Keys of the further samples of a patchwork."""


@dataclass(frozen=True)
class Item:
    """Two images and a question."""

    question: str
    key: str
    """Sample whose prompt is shown."""
    prompt: str
    images: tuple[StudyImage, StudyImage]
    """The first image is the right answer of a control."""
    control: bool = False


def read_sources(roots: Sequence[Path]) -> list[Source]:
    """List the finished samples of at least two datasets; raise UserError if there are fewer, or a dataset is empty."""
    if len(roots) < 2:
        raise UserError(f"a study compares two datasets or more, got {len(roots)}: madgen study A B -o study")
    resolved = [root.resolve() for root in roots]
    if len(set(resolved)) < len(roots):
        raise UserError(f"the same dataset twice among {', '.join(map(str, roots))}")
    names = [path.name for path in resolved]
    return [
        _source(root, name if names.count(name) == 1 else str(root)) for root, name in zip(roots, names, strict=True)
    ]


def _source(root: Path, name: str) -> Source:
    directory = DatasetDir(root)
    manifest = directory.read_manifest()
    samples = {entry.key: entry for entry in directory.entries()}
    if not samples:
        raise UserError(f"{root} has no finished sample yet; run generate first")
    return Source(name, directory, manifest, samples)


def choose_items(sources: Sequence[Source], design: Design) -> list[Item]:
    """Return comparisons and controls; raise UserError if two datasets have no sample in common."""
    rng = random.Random(derived_seed(design.seed, "study"))
    common = {pair: _common(*(sources[index] for index in pair)) for pair in combinations(range(len(sources)), 2)}
    shuffled = _shuffle_by_prompt(set().union(*common.values()), rng)
    items = []
    for (first, second), keys in common.items():
        for key in [key for key in shuffled if key in keys][: design.pairs]:
            images, prompt = (StudyImage(first, key), StudyImage(second, key)), sources[first].samples[key].prompt
            items += [Item(question, key, prompt, images) for question in design.questions]
    return items + _controls(sources, design, shuffled, rng)


def _common(first: Source, second: Source) -> set[str]:
    """Return the keys that two datasets share with the same prompt."""
    shared = first.samples.keys() & second.samples.keys()
    same = {key for key in shared if first.samples[key].prompt == second.samples[key].prompt}
    if not same:
        reason = "different prompts with the same ids" if shared else "no prompt id and sample number in common"
        raise UserError(
            f"{first.name} and {second.name} cannot be compared: {reason}; generate both from the same prompt file "
            f"(keys such as {min(first.samples)} and {min(second.samples)})"
        )
    return same


def _shuffle_by_prompt(keys: Iterable[str], rng: random.Random) -> list[str]:
    """Shuffle keys, with one sample of each prompt before the second of any."""
    shuffled = sorted(keys)
    rng.shuffle(shuffled)
    by_prompt: dict[str, list[str]] = {}
    for key in shuffled:
        by_prompt.setdefault(prompt_id(key), []).append(key)
    return [key for turn in zip_longest(*by_prompt.values()) for key in turn if key is not None]


def _controls(sources: Sequence[Source], design: Design, keys: Sequence[str], rng: random.Random) -> list[Item]:
    """Pair panoramas with clearly worse images, cycling through questions and prompts."""
    items = []
    for number in range(design.controls):
        question, key = design.questions[number % len(design.questions)], keys[number % len(keys)]
        source = rng.choice([index for index, source in enumerate(sources) if key in source.samples])
        right, prompt = StudyImage(source, key), sources[source].samples[key].prompt
        wrong = _wrong(QUESTIONS[question].control, right, sources, keys, number // len(keys))
        items.append(Item(question, key, prompt, (right, wrong), control=True))
    return items


def _wrong(kind: str, right: StudyImage, sources: Sequence[Source], keys: Sequence[str], repetition: int) -> StudyImage:
    """Return an image that is clearly worse than `right`; a different one in each repetition of a sample."""
    samples = sources[right.source].samples
    if kind == "blurred":
        return StudyImage(right.source, right.key, kind)
    others = _unlike(right.key, samples, keys)
    if kind == "patchwork":
        size = samples[right.key].shape
        same_size = [key for key in others if samples[key].shape == size]
        return StudyImage(right.source, right.key, kind, tuple(same_size[: MAX_PATCHWORK_IMAGES - 1]))
    if not others:
        raise UserError("controls of --question match show a panorama of another prompt, but there is only one prompt")
    return StudyImage(right.source, others[repetition % len(others)])


def _unlike(key: str, samples: dict[str, SampleEntry], keys: Sequence[str]) -> list[str]:
    """Return a sample of each other prompt, starting with the prompts that share the fewest words with this one."""
    words = {other: set(samples[other].prompt.lower().split()) for other in (key, *keys) if other in samples}
    own, prompts = words[key], {samples[key].prompt}
    others = []
    for other in sorted(words, key=lambda other: len(words[other] & own) / max(1, len(words[other] | own))):
        if (prompt := samples[other].prompt) not in prompts:
            prompts.add(prompt)
            others.append(other)
    return others
