"""Law 4 under kills, stops and failing calls: a short run of `tests/support/faults.py`."""

import subprocess

import faults
import faults_disk
import pytest
from faults_worker import Sabotage


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return faults.Lab(tmp_path_factory.mktemp("faults"), panoramas=12)


def judge(outcome):
    print(outcome.row())
    assert outcome.problems == []


@pytest.mark.slow
def test_dataset_is_exact_after_kills_at_random_instants(lab):
    outcome = faults.kills(lab, 4, seed=1)
    assert outcome.faults == 4
    judge(outcome)


@pytest.mark.slow
def test_dataset_is_exact_with_one_worker_killed_and_one_late(lab):
    judge(faults.crowd(lab))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_dataset_is_exact_after_a_worker_pauses_past_its_lease(lab, late):
    judge(faults.stopped(lab, late))


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", Sabotage.all(), ids=lambda sabotage: sabotage.name)
def test_dataset_is_exact_after_a_failing_call(lab, sabotage):
    judge(faults.sabotaged(lab, sabotage))


@pytest.mark.slow
@pytest.mark.parametrize("disk", list(faults_disk.SCENARIOS))
def test_dataset_is_exact_after_disk_faults(lab, disk):
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("mounting in a namespace of one's own is not permitted here")
    judge(faults.mounted(lab, disk))


@pytest.mark.slow
def test_judge_reports_wrong_bytes_missing_shards_and_stray_files(lab):
    """A dataset with other bytes, a missing shard and a stray file is not called whole."""
    directory = lab.new()
    assert lab.finish(directory) == 0
    directory.tar("job-000001").unlink()
    (directory.root / "stray").write_text("x", encoding="utf-8")
    outcome = faults.Outcome("broken")
    lab.judge(outcome, directory)
    assert {"other bytes", "stray files ['stray']"} <= set(outcome.problems)
    assert any("cannot be read" in problem for problem in outcome.problems)
