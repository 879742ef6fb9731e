import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from plans import new_dataset, table_of, tasks_of
from processes import environment

from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.shards.writer import OpenShard
from madgen.dataset.verify import verify
from madgen.types import Prompt, Record
from madgen.utils.atomic import temporary_path, write_atomically

PLAN = Plan("job", table_of(Prompt("p" * 90 + str(i), f"text {i}", "", 8, 16) for i in range(5)), 1, 3, 0)


def record(task, **change):
    image = np.random.default_rng(task.seed).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    metadata = {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 8, "width": 16, **change}
    return Record(task, image, metadata)


def sample(task, **change):
    return encode_sample(record(task, **change), "png", 95)


def write(directory, index, worker="w", **change):
    shard = OpenShard(directory, PLAN.shard(index), worker)
    for position, task in enumerate(PLAN.shard(index).tasks):
        shard.add(position, sample(task, **change))
    shard.publish()


@pytest.fixture
def directory(tmp_path):
    return new_dataset(PLAN, tmp_path)


@pytest.fixture
def dataset(directory):
    for index in range(PLAN.shard_count):
        write(directory, index)
    return directory


def test_a_complete_dataset_is_as_planned(dataset):
    verdict = verify(dataset)
    assert (verdict.problems, verdict.present, verdict.complete) == ([], 5, True)


def test_bytes_depend_on_the_samples_alone(dataset):
    before = dataset.tar("job-000001").read_bytes()
    dataset.sidecar("job-000001").unlink()
    write(dataset, 1, worker="another")
    assert dataset.tar("job-000001").read_bytes() == before


def test_long_keys_round_trip(dataset):
    with tarfile.open(dataset.tar("job-000000")) as tar:
        assert "p" * 90 + "0-0000.json" in tar.getnames()


@pytest.mark.parametrize("both", [True, False])
def test_a_missing_shard_is_incomplete_not_broken(dataset, both):
    """A tar whose sidecar is not there yet is about to be finished, or will be made again."""
    if both:
        dataset.tar("job-000001").unlink()
    dataset.sidecar("job-000001").unlink()
    verdict = verify(dataset)
    assert (verdict.problems, verdict.complete, verdict.present) == ([], False, 3)


@pytest.mark.parametrize("kind", ["flip", "truncate", "no tar", "wrong key", "stranger", "empty sidecar"])
def test_damage_is_found(dataset, kind):
    tar, sidecar = dataset.tar("job-000001"), dataset.sidecar("job-000001")
    if kind == "flip":
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(data)
    elif kind == "truncate":
        os.truncate(tar, tar.stat().st_size // 2)
    elif kind == "no tar":
        tar.unlink()
    elif kind == "wrong key":
        sidecar.unlink()
        write(dataset, 1, key="other")
    elif kind == "stranger":
        sidecar.rename(dataset.sidecar("job-000009"))
        tar.rename(dataset.tar("job-000009"))
    else:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        sidecar.write_text(json.dumps({**content, "samples": []}), encoding="utf-8")
    verdict = verify(dataset)
    assert verdict.problems, kind
    assert not verdict.complete


def test_samples_come_in_order_and_a_shard_is_published_whole(directory):
    shard = OpenShard(directory, PLAN.shard(0), "w")
    with pytest.raises(ValueError, match="sample 0 comes next, got 1"):
        shard.add(1, sample(tasks_of(PLAN)[1]))
    shard.add(0, sample(tasks_of(PLAN)[0]))
    with pytest.raises(ValueError, match="1 of 3 samples"):
        shard.publish()
    shard.discard()
    assert list(directory.open_shards.iterdir()) == []
    assert list(directory.shards.iterdir()) == []


def test_paused_worker_does_not_damage_the_dataset(dataset):
    """It wakes up when another has published its shard: its own tar is dropped, nothing else changes."""
    before = dataset.tar("job-000001").stat().st_mtime_ns
    dataset.sidecar("job-000001").rename(dataset.root / "aside")
    late = OpenShard(dataset, PLAN.shard(1), "late")
    for position, task in enumerate(PLAN.shard(1).tasks):
        late.add(position, sample(task))
    (dataset.root / "aside").rename(dataset.sidecar("job-000001"))
    assert not late.publish()
    assert dataset.tar("job-000001").stat().st_mtime_ns == before
    assert list(dataset.open_shards.iterdir()) == []


def test_an_atomic_write_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_differences_name_the_keys():
    old, new = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 2, "c": (1,)}, "d": 2}
    assert manifest.differences(old, new) == ["a.b: 1 there, 2 here"]
    assert manifest.differences({}, {"compile": True}) == ["compile: false there, true here"]


def test_sweep_removes_only_leftovers_of_killed_workers(tmp_path):
    directory = DatasetDir(tmp_path)
    for folder in ("samples", "shards"):
        (tmp_path / folder).mkdir()
    names = ("dataset.json", "index.parquet", "samples/1.jpg", "shards/job-000000.json")
    started = (
        "import sys, pathlib, madgen.utils.atomic as f; "
        "[f.temporary_path(pathlib.Path(n)).touch() for n in sys.argv[1:]]"
    )
    subprocess.run([sys.executable, "-c", started, *names], cwd=tmp_path, env=environment(), check=True)  # has ended
    left = {path for path in tmp_path.rglob(".*") if path.is_file()}
    assert len(left) == len(names)
    elsewhere = tmp_path / ".README.md.ffffff0000000100000000"
    kept = {tmp_path / "README.md", tmp_path / ".hidden.folder", temporary_path(tmp_path / "index.parquet"), elsewhere}
    for path in kept:
        path.touch()
    directory.sweep()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept
    os.utime(elsewhere, (0, 0))
    directory.sweep()
    assert not elsewhere.exists()
