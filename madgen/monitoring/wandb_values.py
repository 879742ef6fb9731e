"""Values logged to Weights & Biases: points of the curves, the table of samples, thumbnails, scores."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import wandb
from PIL import Image

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import Sample, read_entry
from madgen.monitoring.status import settled

THUMBNAIL_HEIGHT = 128  # pixels
TABLE_ROWS = 100


def point_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the values to log for a state of the dataset, without those that are not known yet."""
    live = [worker for worker in state["workers"] if worker["state"] not in ("dead", "silent")]
    working = [worker for worker in live if worker["rate_per_s"]]
    total = sum(state["seconds"].values())
    values: dict[str, Any] = {
        "samples": settled(state),
        "progress": settled(state) / state["planned"],
        "shards_done": state["shards"]["done"],
        "workers": len(live),
        "workers_lost": len(state["workers"]) - len(live),
        "panoramas_per_s": state["rate_per_s"],
        "megapixels_per_s": state["megapixels_per_s"],
        "eta_s": state["eta_s"],
        "quarantined": state["quarantined"],
        **{f"quarantined/{reason}": count for reason, count in state["quarantined_by_reason"].items()},
        **{f"time_share/{name}": seconds / total for name, seconds in state["seconds"].items() if total},
    }
    if working:
        values["device/panoramas_per_s"] = statistics.mean(worker["rate_per_s"] for worker in working)
        values["device/megapixels_per_s"] = statistics.mean(worker["megapixels_per_s"] or 0.0 for worker in working)
        values["device/slowest_panoramas_per_s"] = min(worker["rate_per_s"] for worker in working)
        values["device/memory_gb"] = max(worker["memory_bytes"] or 0 for worker in working) / 1e9
    return {name: value for name, value in values.items() if value is not None}


def samples_table(directory: DatasetDir) -> wandb.Table:
    """Return a table of evenly spaced samples of a complete dataset, with their scores."""
    rows = [(key, sample, sample.metadata.get("scores") or {}) for key, sample in _spread(directory)]
    names = sorted({name for _, _, scores in rows for name in scores})
    table = wandb.Table(columns=["key", "prompt", "seed", "panorama", *names])
    for key, sample, scores in rows:
        picture, about = wandb.Image(thumbnail(sample.image_HWC)), sample.metadata
        table.add_data(key, about["prompt"], about["seed"], picture, *(scores.get(name) for name in names))
    return table


def _spread(directory: DatasetDir) -> Iterator[tuple[str, Sample]]:
    counts = [(sidecar.shard, len(sidecar.samples)) for sidecar in directory.sidecars()]
    total = sum(count for _, count in counts)
    wanted = {index * total // min(total, TABLE_ROWS) for index in range(min(total, TABLE_ROWS))}
    for entry in directory.entries_at(counts, wanted):
        yield entry.key, read_entry(directory, entry)


def thumbnail(image_HWC: np.ndarray) -> Image.Image:
    """Downscale an image to a height of at most 128 px."""
    image = Image.fromarray(image_HWC)
    image.thumbnail((image.width, THUMBNAIL_HEIGHT))
    return image


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean, standard deviation and protocol of each metric of an evaluation."""
    values: dict[str, Any] = {}
    for name, score in report["metrics"].items():
        values |= {f"scores/{name}": score["mean"], f"scores/{name}_std": score["std"]}
        values |= {f"scores/{name}_protocol": score["protocol_id"], f"scores/{name}_network": score["network"]}
    return values
