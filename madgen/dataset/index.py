"""Files derived from the finished shards: `index.parquet`, the dataset card and `quarantine.jsonl`.

All can be made again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from madgen.config.schema import SCORES
from madgen.dataset.card import Facts, card, write_pictures
from madgen.dataset.format import SampleEntry, to_json
from madgen.dataset.layout import DatasetDir
from madgen.utils.atomic import atomic, write_atomically

COLUMNS = ("key", "prompt_id", "sample_index", "shard", "offset", "size", "sha256", "seed", "prompt", "height", "width")


def write_index(directory: DatasetDir) -> Path:
    """Rebuilds `index.parquet` (one row a sample, in order), `README.md` and its pictures from the sidecars."""
    import pyarrow
    from pyarrow import parquet

    manifest = directory.read_manifest()
    types = {name: pyarrow.string() for name in ("key", "prompt_id", "shard", "sha256", "prompt")}
    types |= dict.fromkeys(SCORES, pyarrow.float64())  # null where a sample has none
    schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in (*COLUMNS, *SCORES)])
    path = directory.root / "index.parquet"
    facts, counts = Facts(), list[tuple[str, int]]()
    with atomic(path) as stream, parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for sidecar in directory.sidecars():
            rows = [_row(entry) for entry in sidecar.samples]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            counts.append((sidecar.shard, len(rows)))
            facts.quarantined += len(sidecar.quarantine)
            for entry in sidecar.samples:
                facts.add(entry)
    write_pictures(directory, facts, counts)
    write_atomically(directory.root / "README.md", card(manifest, facts).encode())
    return path


def _row(entry: SampleEntry) -> dict[str, Any]:
    prompt_id, _, number = entry.key.rpartition("-")
    derived = {"shard": entry.shard, "prompt_id": prompt_id, "sample_index": int(number)}
    return {**entry.as_dict(), **(entry.scores or {}), **derived}


def write_quarantine(directory: DatasetDir) -> None:
    """Rebuilds `quarantine.jsonl`, a line for each sample that could not be made; none, no file."""
    path = directory.root / "quarantine.jsonl"
    lines = b"".join(
        to_json({"shard": sidecar.shard, **entry.as_dict()})
        for sidecar in directory.sidecars()
        for entry in sidecar.quarantine
    )
    if lines:
        write_atomically(path, lines)
    else:
        path.unlink(missing_ok=True)


def is_tidy(directory: DatasetDir) -> bool:
    """Whether a complete dataset has been finished off before: nothing is left to derive or to remove."""
    return (directory.root / "index.parquet").exists() and not directory.work.exists()
