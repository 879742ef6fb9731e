"""Values logged to Weights & Biases: points of the curves, the table of samples, thumbnails, scores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import wandb
from PIL import Image

from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry
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
    counts = [(sidecar.shard, len(sidecar.samples)) for sidecar in directory.sidecars()]
    entries = list(directory.evenly_spaced(counts, TABLE_ROWS))
    names = sorted({name for entry in entries for name in entry.scores or {}})
    table = wandb.Table(columns=["key", "prompt", "seed", "panorama", *names])
    for entry in entries:
        picture, scores = wandb.Image(thumbnail(read_entry(directory, entry).image_HWC)), entry.scores or {}
        table.add_data(entry.key, entry.prompt, entry.seed, picture, *(scores.get(name) for name in names))
    return table


def thumbnail(image_HWC: np.ndarray) -> Image.Image:
    """Downscale an image to a height of at most 128 px."""
    image = Image.fromarray(image_HWC)
    if image.height <= THUMBNAIL_HEIGHT:
        return image
    return image.resize((max(1, image.width * THUMBNAIL_HEIGHT // image.height), THUMBNAIL_HEIGHT))


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean, standard deviation and protocol of each metric of an evaluation."""
    values: dict[str, Any] = {}
    for name, score in report["metrics"].items():
        values |= {f"scores/{name}": score["mean"], f"scores/{name}_std": score["std"]}
        values |= {f"scores/{name}_protocol": score["protocol_id"], f"scores/{name}_network": score["network"]}
    return values
