"""A dataset's scores: per prompt, then mean and deviation over prompts, each with the protocol that it was made by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.layout import DatasetDir
from madgen.evaluation.pairs import score_pairs
from madgen.evaluation.partial_results import Collected, Column, collect, digest, prompt_of
from madgen.evaluation.runner import Place, measure
from madgen.metrics import against_reference, metric
from madgen.metrics.crops import Crops
from madgen.metrics.extractors import Extractors, Network
from madgen.metrics.giqa import NEIGHBOURS
from madgen.utils.errors import UserError

VERSION = 1
"""Raise it when a metric changes its meaning: reports of different versions are not compared."""
HALVES = "halves"
"""In place of a reference: one random half of each prompt's pictures against the other, the paper's rows of SD."""


@dataclass(frozen=True)
class Evaluation:
    """What is asked."""

    directory: DatasetDir
    reference: DatasetDir | None
    metrics: tuple[str, ...]
    networks: Extractors
    crops: Crops
    parts: Path
    """Where partial results of the dataset go."""
    reference_parts: Path
    halves: bool = False
    """No reference: one half of the pictures against the other, and pairs of pictures instead of pairs of crops."""
    pairs: int = 1000
    """A prompt, with `halves`."""
    pool: str = "prompts"
    """`prompts`: a score for each, then their mean and deviation; `dataset`: one score of everything."""
    batch: int = 8

    def column(self, name: str) -> Column:
        """What a metric needs to know of each sample: its number, or the features."""
        module = metric(name)
        network = self.networks[module.NETWORK]
        if against_reference(name):
            protocol = {"of": network.describe(), "crops": self.crops.describe("random")}
            return Column("features", protocol, lambda pictures: _features(network, pictures))
        protocol = {
            "definition": module.DEFINITION,
            "of": network.describe(),
            "crops": self.crops.describe(module.CROPS),
        }
        return Column(name, protocol, lambda pictures: np.array(module.score(pictures, network), dtype=np.float64))

    @cached_property
    def columns(self) -> dict[str, Column]:
        """One for each metric; metrics that look at the same features share theirs."""
        return {name: self.column(name) for name in self.metrics}

    def between_pictures(self, name: str) -> bool:
        """Whether a metric of pairs of crops compares different pictures here."""
        return self.halves and getattr(metric(name), "CROPS", "") == "all"

    def distinct(self, names: Sequence[str]) -> list[Column]:
        """The columns of these metrics, each once."""
        return list({self.columns[name].id: self.columns[name] for name in names}.values())


def _features(network: Network, pictures: Sequence[Any]) -> np.ndarray:
    return network.image_features([picture.crop for picture in pictures]).float().cpu().numpy()


def evaluate(asked: Evaluation, place: Place | None = None) -> dict[str, Any] | None:
    """The report, see `report`; None in a process that only helped. UserError before anything is computed."""
    place = Place.here() if place is None else place
    compared = [name for name in asked.metrics if against_reference(name)]
    prompts = _check(asked, compared)
    names = [name for name in asked.metrics if not asked.between_pictures(name)]
    found = measure(asked.directory, asked.distinct(names), asked.parts, asked.crops, asked.batch, place)
    if compared and asked.reference is not None:
        columns = asked.distinct(compared)
        found &= measure(asked.reference, columns, asked.reference_parts, asked.crops, asked.batch, place)
    if place.rank != 0:
        return None
    assert found
    return {
        "madgen_report": VERSION,
        "dataset": describe(asked.directory, prompts),
        "pool": asked.pool,
        "metrics": {name: _scored(asked, name) for name in asked.metrics},
        "prompts": {prompt: text for prompt, (text, _) in prompts.items()},
    }


def counted(directory: DatasetDir) -> dict[str, tuple[str, int]]:
    """The text of each prompt of the finished shards and the number of its samples, by id, sorted."""
    found: dict[str, tuple[str, int]] = {}
    for sidecar in directory.sidecars():
        for entry in sidecar["samples"]:
            prompt = prompt_of(entry["key"])
            found[prompt] = (entry["prompt"], found.get(prompt, ("", 0))[1] + 1)
    return dict(sorted(found.items()))


def describe(directory: DatasetDir, prompts: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """Which dataset, and how much of it is there."""
    content = directory.read_manifest()
    samples = sum(count for _, count in prompts.values())
    return {
        "name": content["job"]["name"],
        "fingerprint": content["fingerprint"],
        "samples": samples,
        "planned": content["plan"]["samples"],
        "prompts": len(prompts),
        "identity": content["identity"],
    }


def _check(asked: Evaluation, compared: Sequence[str]) -> dict[str, tuple[str, int]]:
    prompts = counted(asked.directory)
    if not prompts:
        raise UserError(f"{asked.directory.root} has no finished shard yet; run generate first")
    if not compared:
        return prompts
    if asked.halves:
        _enough(compared, {prompt: count // 2 for prompt, (_, count) in prompts.items()}, asked, "a half of a prompt")
        return prompts
    if asked.reference is None:
        raise UserError(f"{', '.join(compared)} compare with a reference; name one with --reference")
    reference = counted(asked.reference)
    if lacking := [text for prompt, (text, _) in prompts.items() if prompt not in reference]:
        raise UserError(f"the reference {asked.reference.root} has no pictures of the prompt {lacking[0]!r}")
    _enough(compared, {prompt: count for prompt, (_, count) in prompts.items()}, asked, "of a prompt")
    _enough(compared, {prompt: reference[prompt][1] for prompt in prompts}, asked, "of a prompt in the reference")
    return prompts


def _enough(compared: Sequence[str], counts: dict[str, int], asked: Evaluation, what: str) -> None:
    least = min(counts.values()) if asked.pool == "prompts" else sum(counts.values())
    needed = NEIGHBOURS if ("giqa" in compared and "reference" in what) or what.startswith("a half") else 2
    needed = needed if "giqa" in compared else 2
    if least < needed:
        way_out = "" if asked.pool == "dataset" else ", or one score of all prompts: --pool dataset"
        raise UserError(
            f"{', '.join(compared)} need at least {needed} pictures {what}, got {least}: more samples{way_out}"
        )


def _scored(asked: Evaluation, name: str) -> dict[str, Any]:
    module, column = metric(name), asked.columns[name]
    counts = counted(asked.directory)
    protocol: dict[str, Any] = {"metric": name, "version": VERSION, "definition": module.DEFINITION}
    protocol |= {"network": column.protocol["of"], "crops": column.protocol["crops"], "pool": asked.pool}
    protocol |= {"prompts": digest(sorted(counts))}
    values = _values(asked, name, protocol)
    known = [value for value in values.values() if not math.isnan(value)]
    deviation = float(np.std(known)) if asked.pool == "prompts" and len(known) > 1 else None
    return {
        "label": module.LABEL,
        "network": asked.networks[module.NETWORK].label,
        "higher_is_better": module.HIGHER_IS_BETTER,
        "scale": module.SCALE,
        "mean": float(np.mean(known)) if known else None,
        "std": deviation,
        "count": sum(count for _, count in counts.values()),
        "per_prompt": {prompt: None if math.isnan(value) else value for prompt, value in values.items() if prompt},
        "protocol": protocol,
        "protocol_id": digest(protocol),
    }


def _values(asked: Evaluation, name: str, protocol: dict[str, Any]) -> dict[str, float]:
    """A score for each prompt, or one under "" for all; notes in the protocol what they were compared with."""
    column = asked.columns[name]
    if asked.between_pictures(name):
        protocol["crops"] = asked.crops.describe("random") | {"compared": "random pairs of pictures of a prompt"}
        protocol["pictures"] = {"pairs": asked.pairs}
        network, module = asked.networks[metric(name).NETWORK], metric(name)
        found = score_pairs(asked.directory, module, network, column, asked.parts, asked.crops, asked.pairs)
        return found if asked.pool == "prompts" else {"": _mean(np.array(list(found.values())))}
    own = collect(asked.directory, column, asked.parts)
    rows = own.of_prompts() if asked.pool == "prompts" else {"": slice(0, len(own.keys))}
    if against_reference(name):
        return _distances(asked, name, own, rows, protocol)
    return {prompt: _mean(own.values[part]) for prompt, part in rows.items()}


def _mean(values: np.ndarray) -> float:
    known = np.asarray(values)[~np.isnan(values)]  # a picture of one crop has no pairs of them
    return float(known.mean()) if len(known) else math.nan


def _distances(
    asked: Evaluation, name: str, own: Collected, rows: dict[str, slice], protocol: dict[str, Any]
) -> dict[str, float]:
    """Against the reference's same prompt, or against a half; notes in the protocol what that was."""
    distance = metric(name).distance
    counts = [part.stop - part.start for part in rows.values()]
    protocol["pictures"] = {"least": min(counts), "most": max(counts)}
    if asked.halves:
        protocol["reference"] = {"kind": HALVES, "seed": asked.crops.seed}
        split = {prompt: _halves(own, part, asked.crops.seed) for prompt, part in rows.items()}
        return {prompt: distance(first, second) for prompt, (first, second) in split.items()}
    assert asked.reference is not None
    reference = collect(asked.reference, asked.columns[name], asked.reference_parts)
    theirs = reference.of_prompts() if asked.pool == "prompts" else {"": slice(0, len(reference.keys))}
    counts = [theirs[prompt].stop - theirs[prompt].start for prompt in rows]
    fingerprint = asked.reference.read_manifest()["fingerprint"]
    protocol["reference"] = {"fingerprint": fingerprint, "least": min(counts), "most": max(counts)}
    return {prompt: distance(own.values[part], reference.values[theirs[prompt]]) for prompt, part in rows.items()}


def _halves(own: Collected, rows: slice, seed: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = sorted(range(rows.start, rows.stop), key=lambda row: _draw(own.keys[row], seed))
    middle = len(drawn) // 2
    return own.values[sorted(drawn[:middle])], own.values[sorted(drawn[middle:])]


def _draw(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{key}/half".encode(), digest_size=8).digest()
