"""Recovery of open shards, of shards without a sidecar, and of shards marked for regeneration."""

import hashlib
import json
import os
import tarfile

import numpy as np
import pytest
from plans import table_of

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.format import Piece
from madgen.dataset.index import write_quarantine
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.records import read_span
from madgen.dataset.shards import writer
from madgen.dataset.shards.recovery import reopen_quarantined, repair, salvage
from madgen.dataset.shards.writer import OpenShard
from madgen.dataset.verify import verify
from madgen.monitoring.status import status
from madgen.types import Prompt, Record

PLAN = Plan("job", table_of(Prompt(f"p{i}", f"text {i}", "", 8, 16) for i in range(8)), 1, 4, 0)
SHARD = PLAN.shard(0)


def metadata(task):
    return {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 8, "width": 16}


def sample(task, image_format="png"):
    image = np.random.default_rng(task.seed).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    return encode_sample(Record(task, image, metadata(task)), image_format, 95)


@pytest.fixture
def directory(tmp_path):
    made = DatasetDir(tmp_path / "out")
    manifest.create(made, manifest.manifest(load_job([], ["name=job"]), PLAN, {"a": 1}))
    return made


def found(directory, retry=False):
    return salvage(directory, SHARD, retry)


def resume(directory, **options):
    """Goes on with the first shard as a worker does; how many samples it had to make."""
    shard = OpenShard(directory, SHARD, "w", found(directory, **options))
    for position, task in enumerate(SHARD.tasks):
        if position >= len(shard.settled):
            shard.add(position, sample(task))
    assert shard.publish()
    return shard.made


def begin(directory, count):
    shard = OpenShard(directory, SHARD, "w")
    for position in range(count):
        shard.add(position, sample(SHARD.tasks[position]))
    return shard


@pytest.fixture
def whole(directory):
    """The bytes of the first shard, made at once; the directory is as before."""
    begin(directory, 4).publish()
    data = directory.tar("job-000000").read_bytes()
    directory.tar("job-000000").unlink()
    directory.sidecar("job-000000").unlink()
    return data


def is_clean(directory):
    return list(directory.open_shards.iterdir()) == []


@pytest.mark.parametrize("count", range(5))
def test_committed_samples_are_kept(directory, whole, count):
    shard = begin(directory, count)
    shard.commit()
    shard._tar.write(b"half a sample")  # killed here
    shard._tar.flush()
    assert sorted(found(directory).kept) == list(range(count))
    assert resume(directory) == 4 - count
    assert directory.tar("job-000000").read_bytes() == whole
    assert is_clean(directory)


def test_stop_keeps_complete_samples(directory, whole):
    shard = begin(directory, 2)
    shard.commit()
    shard.leave()
    assert resume(directory) == 2
    assert directory.tar("job-000000").read_bytes() == whole


def test_repeated_stops_lose_no_sample(directory, whole):
    for count in range(1, 4):
        shard = OpenShard(directory, SHARD, "w", found(directory))
        shard.add(count - 1, sample(SHARD.tasks[count - 1]))
        shard.commit()
        shard.leave()
        assert len(list(directory.open_shards.glob("*.tar"))) == 1
    assert resume(directory) == 1
    assert directory.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 700, 3000])
def test_lost_bytes_are_regenerated(directory, whole, cut):
    shard = begin(directory, 4)
    shard.commit()
    shard.leave()
    os.truncate(shard.path, shard.path.stat().st_size - cut)
    kept = sorted(found(directory).kept)
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 4
    assert resume(directory) == 4 - len(kept)
    assert directory.tar("job-000000").read_bytes() == whole


def test_damaged_sample_costs_only_itself(directory, whole):
    shard = begin(directory, 4)
    shard.commit()
    shard.leave()
    data = bytearray(shard.path.read_bytes())
    data[shard.settled[1].offset + 600] ^= 1
    shard.path.write_bytes(data)
    assert sorted(found(directory).kept) == [0, 2, 3]
    assert resume(directory) == 1
    assert directory.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize(
    "tail", [b'{"key": "p3-0000", "off', b"\xff\x00", b"[]\n", b'{"key": 1}\n', b'{"offset": 1}\n']
)
def test_truncated_journal_is_read_up_to_its_last_line(directory, tail):
    shard = begin(directory, 2)
    shard.commit()
    shard.leave()
    with open(shard.journal, "ab") as stream:
        stream.write(tail)
    assert sorted(found(directory).kept) == [0, 1]


def test_two_open_shards_are_merged(directory, whole):
    first = begin(directory, 1)
    first.commit()
    second = begin(directory, 3)
    second.commit()
    os.truncate(first.path, 0)
    assert resume(directory) == 1
    assert is_clean(directory)


def test_open_files_of_another_shard_are_untouched(directory):
    other = OpenShard(directory, PLAN.shard(1), "w")
    other.commit()
    assert found(directory).sources == []
    assert resume(directory) == 4
    assert other.path.exists()


def test_worker_without_its_files_does_not_publish(directory):
    """It stood still for longer than its lease; the one that took over has copied its samples and removed its files."""
    slow = begin(directory, 4)
    slow.commit()
    assert resume(directory) == 0
    directory.sidecar("job-000000").rename(directory.root / "aside")  # as if the other were not quite done
    assert not slow.publish()
    assert is_clean(directory)


def test_a_crash_between_tar_and_sidecar_costs_nothing(directory, whole, monkeypatch):
    def crash(*_):
        raise OSError("crash")

    shard = begin(directory, 4)
    with monkeypatch.context() as patch:
        patch.setattr("madgen.dataset.shards.writer.write_atomically", crash)
        with pytest.raises(OSError, match="crash"):
            shard.publish()
    assert directory.tar("job-000000").exists()
    assert not directory.is_done("job-000000")
    assert resume(directory) == 0
    assert directory.tar("job-000000").read_bytes() == whole
    assert is_clean(directory)


def test_tar_without_sidecar_and_journal_is_generated_again(directory, whole):
    directory.tar("job-000000").write_bytes(whole)
    assert resume(directory) == 4
    assert directory.tar("job-000000").read_bytes() == whole


@pytest.fixture
def quarantined(directory):
    """Two finished shards; the second sample of the first one is in quarantine."""
    shard = OpenShard(directory, SHARD, "w")
    shard.add(0, sample(SHARD.tasks[0]))
    shard.quarantine(1, "not_finite", "NaN in the latents")
    shard.add(2, sample(SHARD.tasks[2]))
    shard.add(3, sample(SHARD.tasks[3]))
    shard.publish()
    other = OpenShard(directory, PLAN.shard(1), "w")
    for position, task in enumerate(PLAN.shard(1).tasks):
        other.add(position, sample(task))
    other.publish()
    return directory


def test_quarantine_is_recorded_and_verified(quarantined):
    verdict = verify(quarantined)
    assert (verdict.present, verdict.quarantined, verdict.complete, verdict.problems) == (7, 1, True, [])
    assert json.loads(quarantined.sidecar("job-000000").read_bytes())["quarantined"] == ["p1-0000"]
    write_quarantine(quarantined)
    (line,) = (quarantined.root / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "shard": "job-000000", "key": "p1-0000", "position": 1, "reason": "not_finite", "detail": "NaN in the latents",
        "seed": SHARD.tasks[1].seed, "prompt": "text 1",
    }  # fmt: skip
    reopen_quarantined(quarantined, quarantined.done())
    write_quarantine(quarantined)
    assert not (quarantined.root / "quarantine.jsonl").exists()


def test_verify_reports_unplanned_quarantine(quarantined):
    path = quarantined.sidecar("job-000000")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["quarantine"][0]["key"] = "p9-0000"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert verify(quarantined).problems == ["the keys are not the planned ones"]


def test_retry_samples_only_the_quarantined(whole, quarantined):
    assert reopen_quarantined(quarantined, quarantined.done()) == 1
    assert quarantined.done() == {"job-000001"}
    assert resume(quarantined) == 1
    assert quarantined.tar("job-000000").read_bytes() == whole
    assert verify(quarantined).complete
    assert reopen_quarantined(quarantined, quarantined.done()) == 0


def test_killed_retry_resumes(whole, quarantined):
    reopen_quarantined(quarantined, quarantined.done())
    shard = OpenShard(quarantined, SHARD, "w", found(quarantined))
    shard.commit()
    shard.leave()
    assert sorted(found(quarantined).kept) == [0, 2, 3]
    assert resume(quarantined) == 1
    assert quarantined.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize("retry", [True, False])
def test_an_open_shard_keeps_its_quarantine_unless_it_is_retried(directory, retry):
    shard = begin(directory, 1)
    shard.quarantine(1, "constant", "")
    shard.commit()
    shard.leave()
    assert (1 in found(directory, retry=retry).kept) == (not retry)


def test_shard_with_only_quarantined_samples_is_complete(directory):
    shard = OpenShard(directory, SHARD, "w")
    for position in range(4):
        shard.quarantine(position, "constant", "")
    shard.publish()
    with tarfile.open(directory.tar("job-000000")) as tar:
        assert tar.getnames() == []
    assert verify(directory).problems == []


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


def test_sidecar_matches_only_its_own_tar(directory, whole, monkeypatch):
    """The tar was removed; it is made again with other bytes, and its worker dies before it writes the sidecar."""
    shard = OpenShard(directory, SHARD, "w")
    for position in range(4):
        shard.quarantine(position, "constant", "")
    shard.publish()
    directory.tar("job-000000").unlink()

    def die(*_):
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr("madgen.dataset.shards.writer.write_atomically", die)
        begin(directory, 4).publish()
    assert directory.tar("job-000000").read_bytes() == whole
    assert not directory.is_done("job-000000")


def test_concurrent_publishing_never_mixes_two_workers(directory, whole, monkeypatch):
    """Another worker's tar, of other bytes, comes between this one's tar and its sidecar."""
    from madgen.dataset.shards import writer as module

    late, write = begin(directory, 4), module.write_atomically

    def meanwhile(path, data):
        other = directory.root / "other"
        other.write_bytes(bytes(10240))
        other.replace(directory.tar("job-000000"))
        write(path, data)

    monkeypatch.setattr(module, "write_atomically", meanwhile)
    late.publish()
    assert not directory.is_done("job-000000")
    monkeypatch.undo()
    assert resume(directory) == 4
    assert directory.tar("job-000000").read_bytes() == whole


def test_a_worker_that_lost_its_claim_does_not_publish(directory):
    assert not begin(directory, 4).publish(owned=lambda: False)
    assert not directory.tar("job-000000").exists()
    assert is_clean(directory)


@pytest.mark.parametrize("change", ["gone", "other"])
def test_recovered_samples_that_change_before_copying_are_an_error(directory, change):
    shard = begin(directory, 3)
    shard.commit()
    shard.leave()
    before = found(directory)
    if change == "gone":
        shard.path.unlink()
    else:
        shard.path.write_bytes(bytes(shard.path.stat().st_size))
    with pytest.raises(OSError, match="salvaged samples have changed"):
        OpenShard(directory, SHARD, "w", before)
    assert {path.stem for path in directory.open_shards.iterdir()} == {shard.path.stem}


def test_full_disk_is_not_filled_further(directory, monkeypatch):
    """The copy of what was salvaged does not fit: nothing of it stays, the original does."""
    shard = begin(directory, 3)
    shard.commit()
    shard.leave()

    def full(*_):
        raise OSError(28, "No space left on device")

    before, salvaged = sorted(directory.open_shards.iterdir()), found(directory)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(writer, "read_span", full)
        OpenShard(directory, SHARD, "w", salvaged)
    assert sorted(directory.open_shards.iterdir()) == before
    assert resume(directory) == 1


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


def test_spans_end_at_the_end_of_the_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    with open(tmp_path / "f", "rb") as stream:
        assert read_span(stream, Piece("k", 1, 2, hashlib.sha256(b"bc").hexdigest())) == b"bc"
        assert read_span(stream, Piece("k", 1, 4, hashlib.sha256(b"bc").hexdigest())) is None


def scored(task):
    """A sample with scores: its bytes and these."""
    image = np.random.default_rng(task.seed).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    scores = {"seam": 1.0 + task.seed % 100 / 100}
    return encode_sample(Record(task, image, {**metadata(task), "scores": scores}), "png", 95), scores


def scores_in_sidecar(directory):
    return [
        entry["scores"] for entry in json.loads(directory.sidecar("job-000000").read_text(encoding="utf-8"))["samples"]
    ]


def test_scores_of_committed_samples_are_kept(directory):
    """Left, copied, published, put back on the list, made again: the sidecar has them as the JSON does."""
    shard = OpenShard(directory, SHARD, "w")
    for position in range(3):
        shard.add(position, *scored(SHARD.tasks[position]))
    shard.commit()
    shard._tar.write(b"half a sample")  # killed here
    shard._tar.flush()
    again = OpenShard(directory, SHARD, "v", found(directory))
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
    last = OpenShard(directory, SHARD, "u", found(directory))
    last.add(1, *scored(SHARD.tasks[1]))
    last.publish()
    assert (scores_in_sidecar(directory), last.made) == (expected, 1)
    assert directory.tar("job-000000").read_bytes() == whole


def test_journal_is_cut_at_invalid_scores(directory):
    shard = begin(directory, 2)
    shard.commit()
    shard.leave()
    first, second = shard.journal.read_bytes().splitlines()
    shard.journal.write_bytes(first + b"\n" + json.dumps({**json.loads(second), "scores": [1]}).encode() + b"\n")
    assert sorted(found(directory).kept) == [0]
