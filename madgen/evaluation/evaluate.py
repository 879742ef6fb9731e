"""Evaluate a dataset: one score per prompt, their mean and standard deviation, and the protocol of each metric."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.layout import DatasetDir
from madgen.evaluation.metric_columns import RankInfo, compute_columns
from madgen.evaluation.pairs import score_pairs
from madgen.evaluation.partial_results import Collected, Column, collect, digest
from madgen.metrics import metric, needs_reference
from madgen.metrics.crops import CroppedImage, Crops
from madgen.metrics.extractors import Extractors, Network
from madgen.metrics.giqa import NEIGHBOURS
from madgen.utils.errors import UserError

VERSION = 1
"""Raise it when the meaning of a metric changes: reports of different versions are not compared."""

PromptCounts = dict[str, tuple[str, int]]
"""Text and number of finished samples by prompt id."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that determines a report."""

    directory: DatasetDir
    reference: DatasetDir | None
    metrics: tuple[str, ...]
    networks: Extractors
    crops: Crops
    parts: Path
    """Folder for partial results of the dataset."""
    reference_parts: Path
    halves: bool = False
    """Compare two random halves of each prompt's images, and pairs of images instead of pairs of crops."""
    pairs: int = 1000
    """Pairs of images per prompt, with `halves`."""
    pool: str = "prompts"
    """`prompts`: a score per prompt, their mean and standard deviation; `dataset`: one score of all images."""
    batch: int = 8

    def column(self, name: str) -> Column:
        """Return the values that a metric needs of each sample: its score, or its features."""
        module = metric(name)
        network = self.networks[module.NETWORK]
        if needs_reference(name):
            protocol = {"of": network.describe(), "crops": self.crops.describe("random")}
            return Column("features", protocol, lambda images: _features(network, images))
        protocol = {
            "definition": module.DEFINITION,
            "of": network.describe(),
            "crops": self.crops.describe(module.CROPS),
        }
        return Column(name, protocol, lambda images: np.array(module.score(images, network), dtype=np.float64))

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The column of each metric; metrics of the same features share one."""
        return {name: self.column(name) for name in self.metrics}

    @property
    def compared(self) -> list[str]:
        """The metrics that compare with a reference."""
        return [name for name in self.metrics if needs_reference(name)]

    def compares_images(self, name: str) -> bool:
        """Return True if a metric over pairs of crops is computed over pairs of images instead."""
        return self.halves and getattr(metric(name), "CROPS", "") == "all"

    def distinct(self, names: Sequence[str]) -> list[Column]:
        """Return the columns of metrics without duplicates."""
        return list({self.columns[name].id: self.columns[name] for name in names}.values())


def _features(network: Network, images: Sequence[CroppedImage]) -> np.ndarray:
    return network.net.features([image.crop for image in images]).float().cpu().numpy()


def evaluate(evaluation: Evaluation, ranks: RankInfo | None = None) -> dict[str, Any] | None:
    """Compute the report on rank 0; other ranks return None. Raise UserError before computing if images are missing."""
    ranks = ranks or RankInfo.from_environment()
    prompts = check_counts(evaluation)
    if evaluation.compared and evaluation.reference is None and not evaluation.halves:
        raise UserError(f"{', '.join(evaluation.compared)} compare with a reference; name one with --reference")
    names = [name for name in evaluation.metrics if not evaluation.compares_images(name)]
    passes = [(evaluation.directory, names, evaluation.parts)]
    if evaluation.compared and evaluation.reference is not None:
        passes.append((evaluation.reference, evaluation.compared, evaluation.reference_parts))
    for directory, of_pass, folder in passes:
        columns = evaluation.distinct(of_pass)
        complete = compute_columns(directory, columns, folder, evaluation.crops, evaluation.batch, ranks)
        assert complete or ranks.rank != 0
    if ranks.rank != 0:
        return None
    return {
        "madgen_report": VERSION,
        "dataset": _describe(evaluation.directory, prompts),
        "pool": evaluation.pool,
        "metrics": {name: _score(evaluation, name, prompts) for name in evaluation.metrics},
        "prompts": {prompt: text for prompt, (text, _) in prompts.items()},
    }


def count_samples(directory: DatasetDir) -> PromptCounts:
    """Count the samples of each prompt in the finished shards."""
    counts: PromptCounts = {}
    for entry in directory.entries():
        counts[entry.prompt_id] = (entry.prompt, counts.get(entry.prompt_id, ("", 0))[1] + 1)
    return dict(sorted(counts.items()))


def _describe(directory: DatasetDir, prompts: PromptCounts) -> dict[str, Any]:
    manifest = directory.read_manifest()
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "samples": sum(count for _, count in prompts.values()),
        "planned": manifest.plan.samples,
        "prompts": len(prompts),
        "identity": manifest.identity,
    }


def check_counts(evaluation: Evaluation) -> PromptCounts:
    """Return the dataset's prompts; raise UserError if it or the reference has too few images for the metrics."""
    prompts = count_samples(evaluation.directory)
    if not prompts:
        raise UserError(f"{evaluation.directory.root} has no finished shard yet; run generate first")
    if not evaluation.compared:
        return prompts
    counts = [count for _, count in prompts.values()]
    neighbours = NEIGHBOURS if "giqa" in evaluation.compared else 2
    if evaluation.halves:
        _require(evaluation, [count // 2 for count in counts], neighbours, " in each half")
        return prompts
    _require(evaluation, counts, 2, "")
    if evaluation.reference is not None:
        reference = count_samples(evaluation.reference)
        if lacking := [text for prompt, (text, _) in prompts.items() if prompt not in reference]:
            raise UserError(f"the reference {evaluation.reference.root} has no images of the prompt {lacking[0]!r}")
        _require(evaluation, [reference[prompt][1] for prompt in prompts], neighbours, " in the reference")
    return prompts


def _require(evaluation: Evaluation, counts: Sequence[int], needed: int, where: str) -> None:
    pooled = evaluation.pool == "dataset"
    count = sum(counts) if pooled else min(counts)
    if count < needed:
        verb = "needs" if len(evaluation.compared) == 1 else "need"
        raise UserError(
            f"{', '.join(evaluation.compared)} {verb} at least {needed} images{'' if pooled else ' per prompt'}{where}"
            f", got {count}; generate more samples"
            + ("" if pooled else ", or score all prompts as one: --pool dataset")
        )


def _score(evaluation: Evaluation, name: str, prompts: PromptCounts) -> dict[str, Any]:
    module, column = metric(name), evaluation.columns[name]
    protocol: dict[str, Any] = {"metric": name, "version": VERSION, "definition": module.DEFINITION}
    protocol |= {"network": column.protocol["of"], "crops": column.protocol["crops"], "pool": evaluation.pool}
    protocol |= {"prompts": digest(sorted(prompts))}
    values, details = _values(evaluation, name)
    protocol |= details
    known = [value for value in values.values() if not math.isnan(value)]
    return {
        "label": module.LABEL,
        "network": evaluation.networks[module.NETWORK].label,
        "higher_is_better": module.HIGHER_IS_BETTER,
        "scale": module.SCALE,
        "mean": float(np.mean(known)) if known else None,
        "std": float(np.std(known)) if evaluation.pool == "prompts" and len(known) > 1 else None,
        "count": sum(count for _, count in prompts.values()),
        "per_prompt": {prompt: None if math.isnan(value) else value for prompt, value in values.items() if prompt},
        "protocol": protocol,
        "protocol_id": digest(protocol),
    }


def _values(evaluation: Evaluation, name: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the score of each prompt, or of all under "", and the protocol of the comparison."""
    module, column, crops = metric(name), evaluation.columns[name], evaluation.crops
    pooled = evaluation.pool == "dataset"
    if evaluation.compares_images(name):
        network, directory = evaluation.networks[module.NETWORK], evaluation.directory
        means = score_pairs(directory, module, network, column, evaluation.parts, crops, evaluation.pairs)
        details = {
            "crops": crops.describe("random") | {"compared": "random pairs of pictures of a prompt"},
            "pictures": {"pairs": evaluation.pairs},
        }
        return {"": _mean(np.array(list(means.values())))} if pooled else means, details
    own = collect(evaluation.directory, column, evaluation.parts)
    rows = {"": slice(0, len(own.keys))} if pooled else own.rows_by_prompt()
    if needs_reference(name):
        return _distances(evaluation, name, own, rows)
    return {prompt: _mean(own.values[part]) for prompt, part in rows.items()}, {}


def _mean(values: np.ndarray) -> float:
    known = np.asarray(values)[~np.isnan(values)]  # an image with a single crop has no pairs of crops
    return float(known.mean()) if len(known) else math.nan


def _distances(
    evaluation: Evaluation, name: str, own: Collected, rows: dict[str, slice]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compare each prompt with the same prompt of the reference, or one half of it with the other."""
    distance = metric(name).distance
    details: dict[str, Any] = {"pictures": _range(rows.values())}
    if evaluation.halves:
        seed = evaluation.crops.seed
        details["reference"] = {"kind": "halves", "seed": seed}
        return {prompt: distance(*_halves(own, part, seed)) for prompt, part in rows.items()}, details
    assert evaluation.reference is not None
    reference = collect(evaluation.reference, evaluation.columns[name], evaluation.reference_parts)
    theirs = {"": slice(0, len(reference.keys))} if "" in rows else reference.rows_by_prompt()
    fingerprint = evaluation.reference.read_manifest().fingerprint
    details["reference"] = {"fingerprint": fingerprint, **_range(theirs[prompt] for prompt in rows)}
    return {
        prompt: distance(own.values[part], reference.values[theirs[prompt]]) for prompt, part in rows.items()
    }, details


def _range(rows: Iterable[slice]) -> dict[str, int]:
    counts = [part.stop - part.start for part in rows]
    return {"least": min(counts), "most": max(counts)}


def _halves(own: Collected, rows: slice, seed: int) -> tuple[np.ndarray, np.ndarray]:
    def rank(row: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{own.keys[row]}/half".encode(), digest_size=8).digest()

    shuffled = sorted(range(rows.start, rows.stop), key=rank)
    middle = len(shuffled) // 2
    return own.values[sorted(shuffled[:middle])], own.values[sorted(shuffled[middle:])]
