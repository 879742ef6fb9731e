"""`generate` with `output.upload`: killed during an upload, resumed, without a server, stopped."""

import signal

import pytest
from processes import until
from s3_server import KEYS, objects, s3_server

from madgen.dataset.format import Manifest, PlanTotals
from madgen.dataset.remote import push as pushing

URL = "s3://bucket/sets/alps"
UPLOAD = f"output.upload={URL}"


@pytest.fixture
def s3(monkeypatch):
    with s3_server(monkeypatch) as server:
        yield server


def local(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {f"sets/alps/{path.relative_to(folder)}": path.read_bytes() for path in files}


@pytest.mark.slow
def test_upload_resumes_after_kill_and_stop(s3, start, madgen_here, job_file, tmp_path, monkeypatch):
    s3.hold_at = "job-000001.tar"
    upload = ("generate", job_file, UPLOAD)
    killed = start(*upload)
    assert s3.held.wait(600)
    killed.kill()
    s3.go_on.set()
    assert not [key for key in objects() if "000001" in key], "an object is there whole or not at all"

    for event in (s3.held, s3.go_on):
        event.clear()
    s3.hold_at = "job-000003.tar"
    stopped = start(*upload, "monitor.wandb.mode=offline", WANDB_DIR=str(tmp_path))
    assert s3.held.wait(600)
    until(
        lambda: "uploading to" in stopped.output()[1] or stopped.poll() is not None, "a run that waits for the upload"
    )
    stopped.send_signal(signal.SIGTERM)
    status, said = stopped.wait(), "".join(stopped.output())
    assert status == 3, said
    assert "rerun the same command" in said
    assert "is off" not in said, "W&B takes the place as a reference"
    s3.hold_at = None
    s3.go_on.set()

    before = len(s3.stored)
    for name in ("FIRST_S", "LONGEST_S"):
        monkeypatch.setattr(pushing, name, 0.01)
    s3.share, s3.faults = 1.0, ("error", "cut")
    failed = madgen_here("generate", job_file, UPLOAD)
    (line,) = [line for line in failed.err.splitlines() if "upload" in line]
    assert line.startswith(f"madgen: the upload to {URL} is not complete: ")
    assert line.endswith(f"rerun the same command, or run madgen push out {URL}")
    assert failed.code == 3
    s3.share = 0.0
    assert madgen_here("generate", job_file, UPLOAD).code == 0
    assert objects() == local(tmp_path / "out")
    assert not set(s3.stored[:before]) & set(s3.stored[before:]), "what was there is not sent again"
    assert madgen_here("verify", "out").code == 0

    secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    everything = [*(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()), *objects().values()]
    assert not [data for data in everything if secret in data]
    assert secret.decode() not in said + failed.err
    before = len(s3.stored)
    assert madgen_here("push", "out", URL).code == 0
    assert len(s3.stored) == before


def test_upload_target_of_another_dataset_is_refused_before_sampling(madgen_here, job_file, tmp_path):
    (tmp_path / "there").mkdir()
    other = Manifest("another", {"name": "job"}, PlanTotals(1, 1, 1, 1, ""))
    (tmp_path / "there/dataset.json").write_bytes(other.to_json())
    result = madgen_here("generate", job_file, f"output.upload=file://{tmp_path}/there")
    assert (result.code, (tmp_path / "out").exists()) == (2, False)
    assert f"output.upload=file://{tmp_path}/there holds another dataset (another); choose another target" in result.err


@pytest.mark.slow
def test_two_concurrent_jobs_upload_everything(s3, start, madgen_here, job_file, tmp_path):
    """Of three processes, over a network that fails."""
    s3.share, s3.faults = 0.05, ("error", "cut")
    upload = ("generate", job_file, UPLOAD, "prompts.samples_per_prompt=4")
    both = [start(*upload, "trainer.devices=2"), start(*upload)]
    assert [process.wait() for process in both] == [0, 0], [process.output() for process in both]
    assert s3.failed
    s3.share = 0.0
    assert objects() == local(tmp_path / "out")
    assert madgen_here("verify", "out").code == 0
