"""Files derived from the finished shards: `index.parquet` and the dataset card. Both can be made again at any time."""

from __future__ import annotations

import os
from pathlib import Path

from madgen.dataset.card import card
from madgen.dataset.layout import DatasetDir, write_atomically

COLUMNS = ("key", "shard", "offset", "size", "sha256", "seed", "prompt", "height", "width")


def write_index(directory: DatasetDir) -> Path:
    """Rebuilds `index.parquet` (one row a sample, in order) and `README.md` from the sidecars."""
    import pyarrow
    from pyarrow import parquet

    content = directory.read_manifest()
    types = {name: pyarrow.string() for name in ("key", "shard", "sha256", "prompt")}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in COLUMNS])
    path = directory.root / "index.parquet"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    samples = total_bytes = 0
    try:
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for sidecar in directory.sidecars():
                rows = [{**sample, "shard": sidecar["shard"]} for sample in sidecar["samples"]]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                samples += len(rows)
                total_bytes += sum(row["size"] for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(directory.root / "README.md", card(content, samples, total_bytes).encode())
    return path
