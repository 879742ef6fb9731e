"""Reads an offline W&B log: a LevelDB log (32 KiB blocks) of protobuf records, after a header of 7 bytes."""

import json
import struct
from pathlib import Path

from processes import until
from wandb.proto import wandb_internal_pb2

BLOCK = 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path):
    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # is being written
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def ended(path: Path) -> Path:
    """The log of a run that ends by itself, when it has: W&B's own process closes it after ours is gone."""
    until(lambda: any(record.HasField("exit") for record in records(path)), f"the end of {path}")
    return path


def history(path: Path) -> list[dict]:
    """The logged points, in order."""
    rows = []
    for record in records(path):
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def run(path: Path):
    """The run's own record: id, project, config."""
    return next(record.run for record in records(path) if record.HasField("run"))
