"""Which pairs a study shows: samples of one prompt and number that two datasets both have, and controls."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from madgen.dataset.filtering.selection import prompt_id
from madgen.dataset.layout import DatasetDir
from madgen.user_study.questions import QUESTIONS, check_questions
from madgen.utils.errors import UserError
from madgen.utils.seeding import derived_seed

MOST_PIECES = 4
"""Panoramas that a patchwork is made of, at most."""


@dataclass(frozen=True)
class Design:
    """What the maker of a study chooses."""

    pairs: int = 20
    """Pairs of panoramas for each two datasets, at most; prompts take turns."""
    controls: int = 6
    """Questions whose answer is known, in all; the paper has 6."""
    questions: tuple[str, ...] = ("both",)
    """Each is asked of every pair."""
    ties: bool = False
    """Whether "no difference" is an answer."""
    seed: int = 0
    """Of the choice of pairs and controls. Order and sides are drawn in the page, anew for each participant."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise UserError(f"--pairs must be >= 1 pair of panoramas for each two datasets, got {self.pairs}")
        if self.controls < 0:
            raise UserError(f"--controls must be >= 0 questions, got {self.controls}; 0 trusts every participant")
        if not self.questions:
            raise UserError(f"no question to ask; there are {', '.join(QUESTIONS)}")
        check_questions(self.questions)


class Place(NamedTuple):
    """What a sidecar tells of a sample: its prompt, its size in pixels, and where it lies."""

    prompt: str
    height: int
    width: int
    shard: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A dataset of the study."""

    name: str
    directory: DatasetDir
    manifest: dict[str, Any]
    samples: dict[str, Place]
    """By key."""


@dataclass(frozen=True)
class Picture:
    """One picture to show: the sample `key` of a dataset as it is (`plain`), `blurred`, or a `patchwork`."""

    source: int
    key: str
    kind: str = "plain"
    others: tuple[tuple[int, str], ...] = ()
    """Dataset and key of what a patchwork is made of besides."""


@dataclass(frozen=True)
class Item:
    """Two pictures and a question."""

    question: str
    key: str
    """Of the sample whose prompt is shown."""
    prompt: str
    pictures: tuple[Picture, Picture]
    control: bool = False
    """Whether it is one; the first picture is then the right answer."""


def read_sources(roots: Sequence[Path]) -> list[Source]:
    """The finished samples of the datasets, from their sidecars; UserError if there are fewer than two."""
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
    samples = {}
    for sidecar in directory.sidecars():
        try:
            for entry in sidecar["samples"]:
                about = {name: entry[name] for name in Place._fields if name != "shard"}
                samples[entry["key"]] = Place(shard=sidecar["shard"], **about)
        except (KeyError, TypeError) as error:
            raise UserError(f"{root}: a sidecar in shards/ is damaged ({error}); see madgen verify") from None
    if not samples:
        raise UserError(f"{root} has no finished sample yet")
    return Source(name, directory, manifest, samples)


def choose_items(sources: Sequence[Source], design: Design) -> list[Item]:
    """Comparisons and controls; UserError if two datasets have no sample in common."""
    rng = random.Random(derived_seed(design.seed, "study"))
    common = {pair: _common(*(sources[index] for index in pair)) for pair in combinations(range(len(sources)), 2)}
    ranked = _taking_turns(set().union(*common.values()), rng)
    items = []
    for (first, second), keys in common.items():
        for key in [key for key in ranked if key in keys][: design.pairs]:
            pictures, prompt = (Picture(first, key), Picture(second, key)), sources[first].samples[key].prompt
            items += [Item(question, key, prompt, pictures) for question in design.questions]
    return items + _controls(sources, design, ranked, rng)


def _common(first: Source, second: Source) -> set[str]:
    """Keys of both whose prompt is the same."""
    shared = first.samples.keys() & second.samples.keys()
    same = {key for key in shared if first.samples[key].prompt == second.samples[key].prompt}
    if not same:
        why = "other prompts under the same ids" if shared else "no prompt id and sample number in common"
        raise UserError(
            f"{first.name} and {second.name} cannot be compared: {why}; generate both from one prompt file "
            f"(keys such as {min(first.samples)} and {min(second.samples)})"
        )
    return same


def _taking_turns(keys: Iterable[str], rng: random.Random) -> list[str]:
    """The keys in random order, but one of each prompt before a second one of any."""
    shuffled = sorted(keys)
    rng.shuffle(shuffled)
    by_prompt: dict[str, list[str]] = {}
    for key in shuffled:
        by_prompt.setdefault(prompt_id(key), []).append(key)
    return [key for turn in zip_longest(*by_prompt.values()) for key in turn if key is not None]


def _controls(sources: Sequence[Source], design: Design, ranked: Sequence[str], rng: random.Random) -> list[Item]:
    """Panoramas from anywhere in the study against what cannot be preferred; questions and prompts take turns."""
    items = []
    for number in range(design.controls):
        question, key = design.questions[number % len(design.questions)], ranked[number % len(ranked)]
        source = rng.choice([index for index, source in enumerate(sources) if key in source.samples])
        right, prompt = Picture(source, key), sources[source].samples[key].prompt
        wrong = _wrong(QUESTIONS[question].control, right, sources, ranked, number // len(ranked))
        items.append(Item(question, key, prompt, (right, wrong), control=True))
    return items


def _wrong(kind: str, right: Picture, sources: Sequence[Source], ranked: Sequence[str], again: int) -> Picture:
    """The picture that nobody who looks prefers to `right`; the next such one where a sample is used `again`."""
    samples = sources[right.source].samples
    if kind == "blurred":
        return Picture(right.source, right.key, kind)
    far = _unlike(right.key, samples, ranked)
    if kind == "patchwork":
        size = samples[right.key][1:3]
        fit = [key for key in far if samples[key][1:3] == size]
        return Picture(right.source, right.key, kind, tuple((right.source, key) for key in fit[: MOST_PIECES - 1]))
    if not far:
        raise UserError("the controls of --question match show another prompt's panorama, and there is only one prompt")
    return Picture(right.source, far[again % len(far)])


def _unlike(key: str, samples: dict[str, Place], ranked: Sequence[str]) -> list[str]:
    """A sample of each other prompt of the dataset, first those that share the fewest words with this one's."""
    words = {other: set(samples[other].prompt.lower().split()) for other in (key, *ranked) if other in samples}
    own, seen = words[key], {samples[key].prompt}
    others = []
    for other in sorted(words, key=lambda other: len(words[other] & own) / max(1, len(words[other] | own))):
        if (prompt := samples[other].prompt) not in seen:
            seen.add(prompt)
            others.append(other)
    return others
