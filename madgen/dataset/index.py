"""Write the files derived from the finished shards: `index.parquet`, the dataset card and `quarantine.jsonl`.

They can be rebuilt from the sidecars at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from madgen.config.schema import SCORES
from madgen.dataset.card import Facts, card, write_pictures
from madgen.dataset.format import COLUMNS, Manifest, SampleEntry, to_json
from madgen.dataset.kept_columns import KeptColumns
from madgen.dataset.layout import DatasetDir
from madgen.dataset.licences import LICENCE_COLUMNS, licence_values
from madgen.types import shard_index
from madgen.utils.atomic import atomic, remove, write_atomically

logger = logging.getLogger(__name__)


def write_index(directory: DatasetDir, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Rebuild `index.parquet` (one row per sample, in order), `README.md` and its images from the sidecars.

    Calls `on_shard(done, total)` after each shard.
    """
    import pyarrow
    from pyarrow import parquet

    manifest = directory.read_manifest()
    kept = KeptColumns.of(directory, manifest)
    types = {name: pyarrow.string() for name in ("key", "prompt_id", "shard", "sha256", "prompt", *LICENCE_COLUMNS)}
    types |= dict.fromkeys(SCORES, pyarrow.float64())  # null if a sample lacks the score
    types |= {"seed": pyarrow.uint64(), **kept.types}
    licences = tuple(name for name in LICENCE_COLUMNS if name not in kept.types)
    names = (*COLUMNS, *SCORES, *licences, *kept.types)
    schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in names])
    path = directory.root / "index.parquet"
    card(manifest, Facts())  # raises for a damaged manifest before anything is written
    facts, counts, total = Facts(), list[tuple[str, int]](), len(directory.finished())
    with atomic(path) as stream, parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for sidecar in directory.sidecars():
            terms = licence_values(manifest, shard_index(sidecar.shard))
            rows = [{**_row(entry, manifest), **terms, **kept.values(entry)} for entry in sidecar.samples]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            counts.append((sidecar.shard, len(rows)))
            facts.quarantined += len(sidecar.quarantine)
            for entry in sidecar.samples:
                facts.add(entry)
            on_shard(len(counts), total)
    if others := sorted(directory.done() - set(directory.finished())):
        fix = f"madgen verify {directory.root} --repair moves them away"
        logger.warning(f"left out {len(others)} of the shards, which are not planned, such as {others[0]}; {fix}")
    write_pictures(directory, facts, counts)
    write_atomically(directory.root / "README.md", card(manifest, facts).encode())
    return path


def _row(entry: SampleEntry, manifest: Manifest) -> dict[str, Any]:
    prompt_id, sample_index = manifest.prompt_id(entry.key), entry.sample_index
    derived = {"shard": entry.shard, "prompt_id": prompt_id, "sample_index": sample_index}
    scores = {name: float(value) for name, value in (entry.scores or {}).items()}
    return {**entry.as_dict(), **scores, **derived}


def write_quarantine(directory: DatasetDir) -> None:
    """Rebuild `quarantine.jsonl` with one line per quarantined sample; remove it if there are none."""
    path = directory.root / "quarantine.jsonl"
    lines = b"".join(
        to_json({"shard": sidecar.shard, **entry.as_dict()})
        for sidecar in directory.sidecars()
        for entry in sidecar.quarantine
    )
    if lines:
        write_atomically(path, lines)
    else:
        remove(path)


def is_tidy(directory: DatasetDir) -> bool:
    """Return whether a complete dataset has its index and no `work/` folder left to remove."""
    return (directory.root / "index.parquet").is_file() and not directory.work.exists()
