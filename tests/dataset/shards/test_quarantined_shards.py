"""Shards with quarantined samples: records, verification, retries."""

import json
import tarfile

import pytest
from open_shards import PLAN, SHARD, begin, resume, salvaged, sample

from madgen.dataset.index import write_quarantine
from madgen.dataset.shards.recovery import reopen_quarantined
from madgen.dataset.shards.writer import OpenShard
from madgen.dataset.verify import verify


@pytest.fixture
def quarantined(directory):
    """Return two finished shards; the second sample of the first one is quarantined."""
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
    shard = OpenShard(quarantined, SHARD, "w", salvaged(quarantined))
    shard.commit()
    shard.leave()
    assert sorted(salvaged(quarantined).kept) == [0, 2, 3]
    assert resume(quarantined) == 1
    assert quarantined.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize("retry", [True, False])
def test_an_open_shard_keeps_its_quarantine_unless_it_is_retried(directory, retry):
    shard = begin(directory, 1)
    shard.quarantine(1, "constant", "")
    shard.commit()
    shard.leave()
    assert (1 in salvaged(directory, retry=retry).kept) == (not retry)


def test_shard_with_only_quarantined_samples_is_complete(directory):
    shard = OpenShard(directory, SHARD, "w")
    for position in range(4):
        shard.quarantine(position, "constant", "")
    shard.publish()
    with tarfile.open(directory.tar("job-000000")) as tar:
        assert tar.getnames() == []
    assert verify(directory).problems == []
