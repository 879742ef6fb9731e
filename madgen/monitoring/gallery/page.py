"""The gallery: one HTML file with everything in it, which asks no network for anything."""

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
from madgen.monitoring.gallery.blocks import block, write_samples
from madgen.monitoring.gallery.pictures import choose_preview
from madgen.monitoring.gallery.samples import finished_samples, spread
from madgen.utils.atomic import atomic

SCRIPTS = ("data.js", "shard.js", "grid.js", "flat.js", "turn.js", "viewer.js", "page.js")
"""In the order in which they run."""
DATA_MARK = "<!--DATA-->"
MOST = 10_000
BUDGET = 64_000_000


def write_gallery(
    directory: Path,
    output: Path | None = None,
    limit: int | None = MOST,
    budget: int = BUDGET,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Path:
    """Writes one self-contained page with the finished samples of the dataset, and returns its path.

    directory: holds `dataset.json` and `shards/`; a shard without its sidecar is still being written and is left out
    output: the page, replaced at once and never seen half written; default `directory/preview.html`
    limit: at most so many samples, evenly spaced over the dataset; None is all of them
    budget: bytes of pictures that the page embeds beside its thumbnails: the originals if they fit, or else previews
        of them, 512 or 256 pixels high, or else none
    progress: is called after each sample with how many are done, and of how many

    Raises UserError: no dataset in `directory`, no finished sample yet, a damaged shard, or a limit below 1.
    """
    dataset = DatasetDir(Path(directory))
    manifest = dataset.read_manifest()
    found = finished_samples(dataset)
    shown = spread(found, limit)
    head, tail = _page(dataset, manifest, len(found), shown)
    output = dataset.root / "preview.html" if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as file:
        file.write(head)
        write_samples(file, dataset, shown, choose_preview(dataset, shown, budget), progress)
        file.write(tail)
    return output


def _page(dataset: DatasetDir, manifest: Manifest, done: int, shown: Sequence[SampleEntry]) -> tuple[bytes, bytes]:
    """What stands before and after the samples: before them all that the first paint needs, the index of them too."""
    planned = max(manifest.plan.samples, done)
    style, script = _asset("page.css"), "".join(_asset(name) for name in SCRIPTS)
    texts = {
        "name": manifest.name,
        "done": f"{done:,} of {planned:,} panoramas done" if done < planned else f"{done:,} panoramas",
        "facts": " · ".join(_facts(done, shown)),
        "value": str(done),
        "max": str(planned),
        "hidden": "hidden" if done == planned else "",
        "policy": f"script-src {_digest(script)}; style-src {_digest(style)}",
    }
    parts = {name: html.escape(text) for name, text in texts.items()}
    parts |= {"style": style, "script": script, "index": block("index", _index(shown))}
    head, _, tail = _asset("page.html").partition(DATA_MARK)
    filled = (re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], part) for part in (head, tail))
    before, after = (part.encode("utf-8", "replace") for part in filled)
    return before, after


def _asset(name: str) -> str:
    return (files("madgen.monitoring.gallery") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A source of a content security policy: this very text may run, or style, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _facts(done: int, shown: Sequence[SampleEntry]) -> Iterator[str]:
    if len(shown) < done:
        yield f"{len(shown):,} of them here, evenly spaced"
    (common, _), *others = Counter(entry.shape for entry in shown).most_common()
    yield f"{common[0]}×{common[1]} px" + (f" and {len(others)} other sizes" if others else "")


def _index(shown: Sequence[SampleEntry]) -> dict[str, Any]:
    """What the list needs of every sample; the rest is in the samples' own blocks."""
    scores = [_finite(entry.scores or {}) for entry in shown]
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


def _finite(scores: dict[str, float]) -> dict[str, float]:
    """Return the scores that are numbers: JSON for a browser has no NaN."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}
