"""Draw a t-SNE map of panoramas' crops among the backbone's square images (Linderman et al., 2019; openTSNE)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from madgen.dataset.layout import DatasetDir
from madgen.evaluation.metric_columns import compute_columns, pick_device
from madgen.evaluation.paper.plan import Made, Paper
from madgen.evaluation.partial_results import Collected, Column, collect
from madgen.evaluation.plots import panels, pyplot, save
from madgen.evaluation.reference import view_side
from madgen.metrics.crops import CroppedImage, Crops
from madgen.metrics.extractors import Extractors, parse

SEED = 0
NEIGHBOURS = 5


def plot_map(paper: Paper, made: Sequence[Made], path: Path, device: str = "auto") -> str:
    """Plot squares in grey and crops in a colour per setting, a panel per prompt; return a table of the coverage."""
    from openTSNE import TSNE

    network = Extractors(parse(paper.extractor), pick_device(device))["features"]
    reference = made[0].reference
    assert reference is not None
    crops = Crops(view_side(made[0].directory.read_manifest().job))
    squares = _tiles(reference, network, crops)
    tiles = {entry.setting.label: _tiles(entry.directory, network, crops) for entry in made}
    prompts = list(squares.rows_by_prompt())
    texts = {entry.prompt_id: entry.prompt for entry in reference.entries()}
    grid = panels(len(prompts), height=4.2, max_columns=3)
    coverages: dict[str, list[float]] = {label: [] for label in tiles}
    for axes, prompt in zip(grid, prompts, strict=False):
        reference_features = _rows(squares, prompt)
        perplexity = min(30, max(2, (len(reference_features) - 1) // 3))
        embedding = TSNE(perplexity=perplexity, random_state=SEED, n_jobs=1).fit(reference_features)
        axes.scatter(*np.asarray(embedding).T, s=8, color="#bbbbbb", label="squares")
        for number, (label, collected) in enumerate(tiles.items()):
            own = _rows(collected, prompt)
            axes.scatter(*np.asarray(embedding.transform(own)).T, s=6, alpha=0.6, color=f"C{number}", label=label)
            coverages[label].append(coverage(own, reference_features))
        axes.set_title(shorten(texts[prompt], 48, placeholder=" …"), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    grid[0].legend(fontsize=7)
    pyplot().suptitle(f"features of {network.label}", fontsize=9)
    save(path)
    lines = [f"Coverage: share of squares with a crop within the distance of their {NEIGHBOURS}-th nearest square.", ""]
    lines += ["| | coverage |", "|---|---|"]
    return "\n".join([*lines, *(f"| {label} | {np.mean(values):.3f} |" for label, values in coverages.items())])


def coverage(features_ND: np.ndarray, reference_MD: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of reference images with a crop within the distance of their k-th neighbour.

    Naeem et al., ICML 2020, with `neighbours` as k.
    """
    reference, features = (array.astype(np.float64) for array in (reference_MD, features_ND))
    distances = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    radius = np.sort(distances, axis=1)[:, min(neighbours, len(reference) - 1)]
    nearest = np.array([np.linalg.norm(features - row, axis=1).min() for row in reference])
    return float((nearest <= radius).mean())


def _tiles(directory: DatasetDir, network: Any, crops: Crops) -> Collected:
    """Compute features [N, T, D] of all T non-overlapping crops of each image."""

    def compute(images: Sequence[CroppedImage]) -> np.ndarray:
        return np.stack([network.net.features(image.tiles).float().cpu().numpy() for image in images])

    column = Column("tiles", {"of": network.describe(), "crops": crops.describe("all")}, compute)
    folder = directory.root / "report" / "parts"
    compute_columns(directory, [column], folder, crops)
    return collect(directory, column, folder)


def _rows(collected: Collected, prompt: str) -> np.ndarray:
    rows = collected.values[collected.rows_by_prompt()[prompt]]
    return np.asarray(rows).reshape(-1, rows.shape[-1])
