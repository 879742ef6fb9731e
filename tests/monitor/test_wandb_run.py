import time

import pytest
from wandb_log import history, records, run


@pytest.fixture
def logged(madgen, job_file, tmp_path):
    result = madgen(
        "generate", job_file, "monitor.wandb.mode=offline", "monitor.preview_every=5", WANDB_DIR=str(tmp_path)
    )
    assert result.code == 0, result.err
    assert "is off" not in result.err
    return sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_the_offline_log_holds_the_curve_the_previews_and_the_job(logged):
    (log,) = logged
    rows = history(log)
    samples = [row["samples"] for row in rows]
    assert samples == sorted(samples)
    assert rows[-1]["samples"] == 10
    assert rows[-1]["progress"] == 1
    rates = [row["panoramas_per_s"] for row in rows if "panoramas_per_s" in row]
    assert rates
    assert min(rates) > 0
    assert sum(any(key.startswith("preview") for key in row) for row in rows) == 2  # samples 1 and 6
    shares = [value for key, value in rows[-1].items() if key.startswith("time_share/")]
    assert sum(shares) == pytest.approx(1)
    config = {item.key: item.value_json for item in run(log).config.update}
    assert '"num_inference_steps":2' in config["sampling"].replace(" ", "")
    assert len(list(log.parent.glob("files/media/images/preview*.png"))) == 2


def test_a_resumed_dataset_goes_on_in_the_same_run(logged, madgen, job_file, tmp_path):
    (tmp_path / "out/shards/job-000003.json").unlink()
    result = madgen("generate", job_file, "monitor.wandb.mode=offline", WANDB_DIR=str(tmp_path))
    assert result.code == 0, result.err
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({run(log).run_id for log in logs}) == 1
    assert history(logs[-1])[-1]["samples"] == 10


def test_a_run_whose_time_is_over_is_marked_as_preempting(madgen, job_file, tmp_path):
    options = ["monitor.wandb.mode=offline", "prompts.samples_per_prompt=500", "output.samples_per_shard=1"]
    limit = str(time.time() + 35)
    result = madgen("generate", job_file, *options, WANDB_DIR=str(tmp_path), MADGEN_END_TIME=limit)
    assert result.code == 3, result.err
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert any(record.HasField("preempting") for record in records(log))


def test_a_broken_monitor_never_stops_a_run(madgen, job_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = madgen("generate", job_file, "monitor.wandb.mode=offline", WANDB_DIR=str(tmp_path / "file"))
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out/shards").glob("*.json"))) == 4
