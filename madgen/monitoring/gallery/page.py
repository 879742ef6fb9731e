"""Write the gallery: one self-contained HTML file, which needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from madgen.config.schema import SCORES
from madgen.dataset.filtering.selection import LOWER_IS_BETTER
from madgen.dataset.format import Manifest, SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.monitoring.gallery.blocks import choose_preview, write_samples
from madgen.monitoring.gallery.samples import present_samples, spread
from madgen.utils.atomic import atomic
from madgen.utils.escaping import json_block

SCRIPTS = ("data.js", "shard.js", "grid.js", "flat.js", "turn.js", "viewer.js", "page.js")
"""In order of execution."""
DATA_MARK = "<!--DATA-->"
MAX_SAMPLES = 10_000
BUDGET = 64_000_000


def write_gallery(
    directory: Path,
    output: Path | None = None,
    limit: int | None = MAX_SAMPLES,
    budget: int = BUDGET,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Path:
    """Write a self-contained page with the samples of a dataset; return its path.

    directory: holds `dataset.json` and `shards/`; samples in open shards are shown as well
    output: the page, replaced by rename; default `directory/preview.html`
    limit: maximum number of samples, evenly spaced over the dataset; None: all
    budget: maximum bytes of embedded images besides thumbnails: the originals if they fit, else previews of 512 or
        256 px height, else none
    progress: called after each sample with the number done and the total

    Raises UserError if there is no dataset or no sample, if a shard is damaged, or for a limit below 1.
    """
    dataset = DatasetDir(Path(directory))
    manifest = dataset.read_manifest()
    found = present_samples(dataset)
    shown = spread(found, limit)
    head, tail = _page(dataset, manifest, found, shown)
    output = dataset.root / "preview.html" if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as file:
        file.write(head)
        write_samples(file, dataset, shown, choose_preview(dataset, shown, budget), progress)
        file.write(tail)
    return output


def _page(
    dataset: DatasetDir, manifest: Manifest, found: Sequence[SampleEntry], shown: Sequence[SampleEntry]
) -> tuple[bytes, bytes]:
    """Return the page before and after the samples; the first part holds all that the first paint needs."""
    done = len(found)
    planned = max(manifest.plan.samples, done)
    style, script = _asset("page.css"), "".join(_asset(name) for name in SCRIPTS)
    texts = {
        "name": manifest.name,
        "done": f"{done:,} of {planned:,} panorama{'s' * (planned != 1)} done"
        if done < planned
        else f"{done:,} panorama{'s' * (done != 1)}",
        "facts": " · ".join(_facts(found, shown)),
        "value": str(done),
        "max": str(planned),
        "hidden": "hidden" if done == planned else "",
        "policy": f"script-src {_digest(script)}; style-src {_digest(style)}",
    }
    parts = {name: html.escape(text) for name, text in texts.items()}
    parts |= {"style": style, "script": script, "index": json_block("index", _index(shown)).decode()}
    head, _, tail = _asset("page.html").partition(DATA_MARK)
    filled = (re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], part) for part in (head, tail))
    before, after = (part.encode("utf-8", "replace") for part in filled)
    return before, after


def _asset(name: str) -> str:
    return (files("madgen.monitoring.gallery") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return a source of a content security policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _facts(found: Sequence[SampleEntry], shown: Sequence[SampleEntry]) -> Iterator[str]:
    if in_open_shards := sum(entry.open_tar is not None for entry in found):
        yield f"{in_open_shards:,} in open shards"
    if len(shown) < len(found):
        yield f"{len(shown):,} of them here, evenly spaced"
    (common, _), *others = Counter(entry.shape for entry in shown).most_common()
    yield f"{common[0]}×{common[1]} px" + (f" and {len(others)} other sizes" if others else "")


def _index(shown: Sequence[SampleEntry]) -> dict[str, Any]:
    """Return the fields of every sample that the list needs; the rest is in the samples' blocks."""
    scores = [  # JSON for a browser has no NaN
        {name: value for name, value in (entry.scores or {}).items() if math.isfinite(value)} for entry in shown
    ]
    present = [name for name in SCORES if any(name in values for values in scores)]
    return {
        "scores": [{"name": name, "lower": name in LOWER_IS_BETTER} for name in present],
        "samples": [
            {
                "key": entry.key,
                "prompt": entry.prompt,
                "width": entry.width,
                "height": entry.height,
                "scores": {name: values[name] for name in present if name in values},
            }
            for entry, values in zip(shown, scores, strict=True)
        ],
    }
