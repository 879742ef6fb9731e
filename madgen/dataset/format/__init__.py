"""Records of a dataset's JSON files: `dataset.json`, `shards/*.json`, and the journals and heartbeats in `work/`.

Each has one parser, `from_json`, which raises `FormatError`, and one writer, `to_json`. Fields that files of
earlier versions lack have defaults. Keys that later versions add are ignored, or kept in `extra` where `madgen filter`
copies a record into another dataset.
"""

from madgen.dataset.format.manifest import Generation, Manifest, PlanTotals, Portion, portion_at
from madgen.dataset.format.shard import (
    COLUMNS,
    Environment,
    QuarantineEntry,
    SampleEntry,
    ShardSummary,
    Sidecar,
    prompt_id,
)
from madgen.dataset.format.work import Claim, Heartbeat, Piece, Process, Quarantined
from madgen.dataset.records import FormatError, InvalidValueError, Record, to_json

__all__ = [
    "COLUMNS",
    "Claim",
    "Environment",
    "FormatError",
    "Generation",
    "Heartbeat",
    "InvalidValueError",
    "Manifest",
    "Piece",
    "PlanTotals",
    "Portion",
    "Process",
    "QuarantineEntry",
    "Quarantined",
    "Record",
    "SampleEntry",
    "ShardSummary",
    "Sidecar",
    "portion_at",
    "prompt_id",
    "to_json",
]
