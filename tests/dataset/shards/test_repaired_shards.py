"""Repair of damaged and unplanned shards."""

import json
import os

import numpy as np
import pytest
from open_shards import SHARD, begin, is_clean, metadata, resume, salvaged

from madgen.dataset.encoding import encode_sample
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.recovery import repair
from madgen.dataset.shards.writer import OpenShard
from madgen.dataset.verify import verify
from madgen.monitoring.status import status
from madgen.types import Record


@pytest.mark.parametrize("kind", ["flip", "truncate", "no tar", "sidecar", "foreign tar", "lost entry"])
def test_broken_shards_are_regenerated(directory, whole, kind):
    begin(directory, 4).publish()
    tar, sidecar = directory.tar("job-000000"), directory.sidecar("job-000000")
    if kind == "flip":
        data = bytearray(whole)
        data[data.index(b"IDAT") + 20] ^= 1
        tar.write_bytes(data)
    elif kind == "truncate":
        os.truncate(tar, len(whole) // 2)
    elif kind == "no tar":
        tar.unlink()
    elif kind == "sidecar":
        sidecar.write_text("{", encoding="utf-8")
    elif kind == "foreign tar":
        tar.write_bytes(bytes(10240))
    else:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        sidecar.write_text(json.dumps({**content, "samples": content["samples"][:2]}), encoding="utf-8")
    verdict = verify(directory)
    assert verdict.problems
    again = repair(directory, verdict).samples
    assert not directory.is_done("job-000000")
    made = resume(directory)
    assert made == again
    assert made == {"flip": 1, "no tar": 4, "sidecar": 4, "foreign tar": 4, "lost entry": 2}.get(kind, made)
    assert tar.read_bytes() == whole
    assert verify(directory).problems == []
    assert is_clean(directory)


def test_temporary_read_error_is_not_reported_as_damage(directory, monkeypatch):
    begin(directory, 4).publish()
    read = DatasetDir.read_sidecar

    def away(self, name):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(DatasetDir, "read_sidecar", away)
    verdict = verify(directory)
    assert "cannot be read" in verdict.problems[0]
    assert repair(directory, verdict).samples == 0
    monkeypatch.setattr(DatasetDir, "read_sidecar", read)
    assert directory.is_done("job-000000")


def test_repair_skips_a_shard_repaired_meanwhile(directory, whole):
    begin(directory, 4).publish()
    directory.tar("job-000000").write_bytes(bytes(10240))
    verdict = verify(directory)
    directory.sidecar("job-000000").unlink()
    begin(directory, 4).publish()
    assert repair(directory, verdict).shards == 0
    assert directory.is_done("job-000000")


def test_repair_moves_unplanned_files_aside(directory):
    begin(directory, 4).publish()
    stranger = directory.tar("job-000077")
    for content in (b"mine", b"mine too"):
        stranger.write_bytes(content)
        repaired = repair(directory, verify(directory))
        assert (repaired.shards, repaired.moved) == (0, 1)
    assert verify(directory).problems == []
    moved = [path.read_bytes() for path in (directory.root / "unplanned").iterdir()]
    assert sorted(moved) == [b"mine", b"mine too"]


def scored(task):
    """Return the bytes of a sample with scores, and the scores."""
    image = np.random.default_rng(task.seed).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    scores = {"seam": 1.0 + task.seed % 100 / 100}
    return encode_sample(Record(task, image, {**metadata(task), "scores": scores}), "png", 95), scores


def scores_in_sidecar(directory):
    return [
        entry["scores"] for entry in json.loads(directory.sidecar("job-000000").read_text(encoding="utf-8"))["samples"]
    ]


def test_scores_of_committed_samples_are_kept(directory):
    """Scores survive a kill, recovery, publishing, repair and regeneration: the sidecar has those of the JSON."""
    shard = OpenShard(directory, SHARD, "w")
    for position in range(3):
        shard.add(position, *scored(SHARD.tasks[position]))
    shard.commit()
    shard._tar.write(b"half a sample")  # killed here
    shard._tar.flush()
    again = OpenShard(directory, SHARD, "v", salvaged(directory))
    assert len(again.settled) == 3
    again.add(3, *scored(SHARD.tasks[3]))
    again.publish()
    expected = [scored(task)[1] for task in SHARD.tasks]
    assert scores_in_sidecar(directory) == expected
    whole = directory.tar("job-000000").read_bytes()
    data = bytearray(whole)
    data[again.settled[1].offset + 600] ^= 1
    directory.tar("job-000000").write_bytes(data)
    repair(directory, verify(directory))
    last = OpenShard(directory, SHARD, "u", salvaged(directory))
    last.add(1, *scored(SHARD.tasks[1]))
    last.publish()
    assert (scores_in_sidecar(directory), last.made) == (expected, 1)
    assert directory.tar("job-000000").read_bytes() == whole


def test_copies_and_hidden_files_are_not_shards(directory):
    begin(directory, 4).publish()
    for name in ("job-000000 (copy)", "._job-000000", "job-000009"):
        for suffix in (".tar", ".json"):
            (directory.shards / f"{name}{suffix}").write_bytes(
                directory.tar("job-000000").with_suffix(suffix).read_bytes()
            )
    assert directory.done() == {"job-000000", "job-000009"}
    verdict = verify(directory)
    assert verdict.present == 4
    assert "job-000009: a shard that was not planned" in verdict.problems
    assert status(directory)["shards"] == {"planned": 2, "done": 1}
