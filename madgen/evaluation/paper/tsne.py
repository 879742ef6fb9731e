"""Where the crops of panoramas lie among the backbone's squares: a t-SNE map (Linderman et al., 2019; openTSNE)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from madgen.dataset.layout import DatasetDir
from madgen.evaluation.paper.plan import Made, Paper
from madgen.evaluation.partial_results import Collected, Column, collect, prompt_of
from madgen.evaluation.plots import pyplot, save
from madgen.evaluation.reference import view_side
from madgen.evaluation.runner import measure, pick_device
from madgen.metrics.crops import Crops
from madgen.metrics.extractors import Extractors, parse
from madgen.utils.errors import UserError

SEED = 0
NEIGHBOURS = 5
COLUMNS = 3
"""Panels side by side."""


def plot_map(paper: Paper, made: Sequence[Made], path: Path, device: str = "auto") -> str:
    """Squares grey, the crops of each setting in a colour, a panel a prompt; and a table of what is covered."""
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise UserError("a t-SNE map needs openTSNE: pip install 'madgen[eval]'") from error
    network = Extractors(parse(paper.extractor), pick_device(device))["features"]
    reference = made[0].reference
    assert reference is not None
    crops = Crops(view_side(made[0].directory.read_manifest()["job"]))
    squares = _tiles(reference, network, crops)
    tiles = {entry.setting.label: _tiles(entry.directory, network, crops) for entry in made}
    prompts = list(squares.of_prompts())
    plot = pyplot()
    texts = {prompt_of(sample["key"]): sample["prompt"] for part in reference.sidecars() for sample in part["samples"]}
    across = min(COLUMNS, len(prompts))
    down = -(-len(prompts) // across)
    figure, grid = plot.subplots(down, across, figsize=(4 * across, 4.2 * down), squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(prompts) :]:
        axes.axis("off")
    covered: dict[str, list[float]] = {label: [] for label in tiles}
    for axes, prompt in zip(panels, prompts, strict=False):
        of_squares = _rows(squares, prompt)
        perplexity = min(30, max(2, (len(of_squares) - 1) // 3))
        placed = TSNE(perplexity=perplexity, random_state=SEED, n_jobs=1).fit(of_squares)
        axes.scatter(*np.asarray(placed).T, s=8, color="#bbbbbb", label="squares")
        for number, (label, found) in enumerate(tiles.items()):
            own = _rows(found, prompt)
            axes.scatter(*np.asarray(placed.transform(own)).T, s=6, alpha=0.6, color=f"C{number}", label=label)
            covered[label].append(coverage(own, of_squares))
        axes.set_title(shorten(texts[prompt], 48, placeholder=" …"), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].legend(fontsize=7)
    figure.suptitle(f"features of {network.label}", fontsize=9)
    save(path)
    lines = [f"Coverage: share of squares with a crop no farther than the {NEIGHBOURS}-th nearest square.", ""]
    lines += ["| | coverage |", "|---|---|"]
    return "\n".join([*lines, *(f"| {label} | {np.mean(values):.3f} |" for label, values in covered.items())])


def coverage(features_ND: np.ndarray, reference_MD: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Share of the reference with a crop no farther than its `neighbours`-th neighbour (Naeem et al., ICML 2020)."""
    reference, features = (array.astype(np.float64) for array in (reference_MD, features_ND))
    among = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    radius = np.sort(among, axis=1)[:, min(neighbours, len(reference) - 1)]
    nearest = np.array([np.linalg.norm(features - row, axis=1).min() for row in reference])
    return float((nearest <= radius).mean())


def _tiles(directory: DatasetDir, network: Any, crops: Crops) -> Collected:
    """Features [N, T, D] of all T crops of each picture that do not overlap."""

    def compute(pictures: Sequence[Any]) -> np.ndarray:
        return np.stack([network.image_features(picture.tiles).float().cpu().numpy() for picture in pictures])

    column = Column("tiles", {"of": network.describe(), "crops": crops.describe("all")}, compute)
    folder = directory.root / "report" / "parts"
    measure(directory, [column], folder, crops)
    return collect(directory, column, folder)


def _rows(found: Collected, prompt: str) -> np.ndarray:
    rows = found.values[found.of_prompts()[prompt]]
    return np.asarray(rows).reshape(-1, rows.shape[-1])
