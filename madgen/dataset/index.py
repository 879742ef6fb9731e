"""Files derived from the finished shards: `index.parquet`, the dataset card and `quarantine.jsonl`.

All can be made again at any time."""

from __future__ import annotations

from pathlib import Path

from madgen.dataset.card import card
from madgen.dataset.layout import DatasetDir, to_json
from madgen.files import atomic, write_atomically
from madgen.schema import SCORES

COLUMNS = ("key", "shard", "offset", "size", "sha256", "seed", "prompt", "height", "width")


def write_index(directory: DatasetDir) -> Path:
    """Rebuilds `index.parquet` (one row a sample, in order) and `README.md` from the sidecars."""
    import pyarrow
    from pyarrow import parquet

    content = directory.read_manifest()
    types = {name: pyarrow.string() for name in ("key", "shard", "sha256", "prompt")}
    types |= dict.fromkeys(SCORES, pyarrow.float64())  # null where a sample has none
    schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in (*COLUMNS, *SCORES)])
    path = directory.root / "index.parquet"
    samples = total_bytes = 0
    with atomic(path) as stream, parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for sidecar in directory.sidecars():
            rows = [{**sample, **sample.get("scores", {}), "shard": sidecar["shard"]} for sample in sidecar["samples"]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            samples += len(rows)
            total_bytes += sum(row["size"] for row in rows)
    write_atomically(directory.root / "README.md", card(content, samples, total_bytes).encode())
    return path


def write_quarantine(directory: DatasetDir) -> None:
    """Rebuilds `quarantine.jsonl`, a line for each sample that could not be made; none, no file."""
    path = directory.root / "quarantine.jsonl"
    found = ((sidecar["shard"], entry) for sidecar in directory.sidecars() for entry in sidecar["quarantine"])
    lines = b"".join(to_json({"shard": shard, **entry}) for shard, entry in found)
    if lines:
        write_atomically(path, lines)
    else:
        path.unlink(missing_ok=True)


def is_tidy(directory: DatasetDir) -> bool:
    """Whether a complete dataset has been finished off before: nothing is left to derive or to remove."""
    return (directory.root / "index.parquet").exists() and not directory.work.exists()
