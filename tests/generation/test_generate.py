"""`madgen generate` end to end on the tiny backbone."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from forks import programs
from PIL import Image
from processes import MADGEN, Forked, environment, until

from madgen import load_job
from madgen.dataset.plan import build_plan


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shards/*.tar"))}


def test_dataset_layout(finished, madgen):
    names = ["README.md", "dataset.json", "index.parquet", "samples", "shards"]
    assert sorted(path.name for path in finished.iterdir()) == names
    names = [f"job-{i:06d}.{suffix}" for i in range(4) for suffix in ("json", "tar")]
    assert sorted(path.name for path in (finished / "shards").iterdir()) == sorted(names)
    sidecar = json.loads((finished / "shards/job-000001.json").read_text(encoding="utf-8"))
    for entry in sidecar["samples"]:
        span = (finished / "shards/job-000001.tar").read_bytes()[entry["offset"] :][: entry["size"]]
        assert hashlib.sha256(span).hexdigest() == entry["sha256"]
    state = json.loads(madgen("status", "out", "--json").out)
    assert (state["planned"], state["done"], state["in_flight"], state["quarantined"]) == (10, 10, 0, 0)
    assert state["complete"]
    assert state["workers"] == []
    assert {"rate_per_s", "eta_s"} <= set(state)


def test_tarfile_reads_the_shards(finished):
    with tarfile.open(finished / "shards/job-000000.tar") as tar:
        members = tar.getmembers()
        assert {member.mtime for member in members} == {0}
        contents = {member.name: tar.extractfile(member).read() for member in members}
    keys = [name.removesuffix(".json") for name in contents if name.endswith(".json")]
    assert len(keys) == 3
    for key in keys:
        metadata = json.loads(contents[f"{key}.json"])
        assert metadata["key"] == key == f"{metadata['prompt_id']}-{metadata['sample_index']:04d}"
        assert contents[f"{key}.txt"].decode() == metadata["prompt"]
        image = Image.open(io.BytesIO(contents[f"{key}.png"]))
        assert (image.width, image.height) == (metadata["width"], metadata["height"]) == (64, 32)


def test_webdataset_reads_the_shards(finished):
    import webdataset

    samples = list(webdataset.WebDataset(str(finished / "shards/job-{000000..000003}.tar"), shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == 10
    assert set(samples[0]) >= {"png", "json", "txt"}


def test_hugging_face_datasets_reads_the_shards(finished, tmp_path):
    import datasets

    files = sorted(str(path) for path in (finished / "shards").glob("*.tar"))
    loaded = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 10
    assert loaded[0]["png"].size == (64, 32)
    assert loaded[0]["json"]["prompt"] == loaded[0]["txt"]


def test_index_has_one_row_per_sample(finished):
    from pyarrow import parquet

    rows = parquet.read_table(finished / "index.parquet").to_pylist()
    assert [row["key"][-4:] for row in rows] == ["0000", "0001"] * 5
    assert {row["shard"] for row in rows} == {f"job-{i:06d}" for i in range(4)}


def test_rerunning_a_complete_job_writes_nothing(finished, madgen, job_file):
    before = {path: path.stat().st_mtime_ns for path in (finished / "shards").iterdir()}
    result = madgen("generate", job_file)
    assert result.code == 0
    assert "; 0 generated\n" in result.err
    assert {path: path.stat().st_mtime_ns for path in (finished / "shards").iterdir()} == before


def test_complete_dataset_is_reported_without_loading_torch(finished, job_file, tmp_path):
    """Thousands of array tasks may start after a dataset is complete."""
    script = (
        "import sys\n"
        f"sys.argv = ['madgen', 'generate', {str(job_file)!r}]\n"
        "from madgen.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as stopped:\n    code = stopped.code or 0\n"
        "print(code, [name for name in ('torch._C', 'lightning', 'diffusers', 'wandb') if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "0 []"
    assert "; 0 generated\n" in run.stderr


def test_prompts_are_read_once_and_shared(job_file, tmp_path, monkeypatch):
    """Later workers read the plan that the first one saved."""
    options = ["prompts.samples_per_prompt=500"]
    process = Forked(("generate", job_file, *options), tmp_path, environment())
    plans = tmp_path.joinpath("out", "work", "plan")
    while process.poll() is None and not list(plans.glob("*.arrow")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3, process.output()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "madgen.dataset.plan.read_prompts", lambda *arguments: pytest.fail("the prompts were read again")
    )
    plan = build_plan(load_job([job_file], options), plans)
    assert (plan.samples, plan.prompts[4].text) == (2500, "mountains over a meadow at noon 4")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(madgen, job_file, tmp_path):
    """Without OMP_NUM_THREADS, Lightning would divide the threads between the two processes."""
    for devices, folder in ((1, "one"), (2, "two")):
        result = madgen(
            "generate",
            job_file,
            f"trainer.devices={devices}",
            f"output.dir={folder}",
            "output.samples_per_shard=1",
            "sampling.num_inference_steps=10",
            OMP_NUM_THREADS=None,
            OMP_WAIT_POLICY="PASSIVE",  # else threads of both processes spin while they wait for a core
        )
        assert result.code == 0, result.err
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
    sidecars = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "two/shards").glob("*.json")]
    assert len({sidecar["worker"] for sidecar in sidecars}) == 2, "one process did all the work"


@pytest.mark.slow
def test_two_jobs_share_a_directory(finished, start, job_file, tmp_path):
    started = [start("generate", job_file, "output.dir=shared") for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0], [process.output() for process in started]
    assert hashes(tmp_path / "shared") == hashes(finished)


SHARDS_OF_ONE = ["output.samples_per_shard=1", "sampling.num_inference_steps=20"]
STOP_AFTER_TWO = f"""
import os, signal
from madgen.dataset.shards.writer import OpenShard
publish, published = OpenShard.publish, []
def publish_and_stop(*arguments):
    published.append(publish(*arguments))
    if len(published) == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return published[-1]
OpenShard.publish = publish_and_stop
{MADGEN}"""
"""`madgen`, in a process that stops itself once two shards are finished."""


def interrupt(start, job_file, folder, *signals, devices):
    """Start a run in `folder / "cut"`, send signals once two shards are done; return its exit status."""
    job = ("generate", job_file, "output.dir=cut", *SHARDS_OF_ONE)
    if devices == 1:
        process = Forked(job, folder, environment(), STOP_AFTER_TWO)
        until(lambda: "State:\tT" in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"), "two shards")
    else:
        process = start(*job, f"trainer.devices={devices}")
        until(
            lambda: len(list((folder / "cut/shards").glob("*.json"))) >= 2 or process.poll() is not None, "two shards"
        )
    for number in signals:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    return process.wait()


@pytest.fixture(scope="module")
def whole(job_file_of_module):
    """Hashes of the shards of an uninterrupted slow run."""
    process = Forked(("generate", job_file_of_module, *SHARDS_OF_ONE), job_file_of_module.parent, environment())
    assert process.wait() == 0, process.output()
    return hashes(job_file_of_module.parent / "out")


@pytest.mark.parametrize(
    ("signals", "code", "devices"),
    [
        ([signal.SIGKILL], -9, 1),
        pytest.param([signal.SIGTERM], 3, 1, marks=pytest.mark.slow),
        pytest.param([signal.SIGUSR1], 3, 1, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT], 3, 1, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], 3, 1, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], 3, 2, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_resumes(whole, start, madgen, job_file, tmp_path, signals, code, devices):
    assert interrupt(start, job_file, tmp_path, *signals, devices=devices) == code
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut/shards").glob("*.tar")}
    assert 2 <= len(first) < 10, "the signal came too late"
    time.sleep(1)
    assert len(list((tmp_path / "cut/shards").glob("*.tar"))) == len(first), "another process went on"
    assert not json.loads(madgen("status", "cut", "--json").out)["complete"]
    assert madgen("verify", "cut").code == 3
    result = madgen("generate", job_file, "output.dir=cut", *SHARDS_OF_ONE)
    assert result.code == 0, result.err
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut/shards").glob("*.tar")}
    assert {name: after[name] for name in first} == first, "a finished shard was made again"
    assert hashes(tmp_path / "cut") == whole
    assert not (tmp_path / "cut/work").exists()


@pytest.mark.slow
def test_resume_keeps_complete_samples_of_an_open_shard(madgen, start, job_file, tmp_path):
    """One process is killed, the next one is asked to stop, and the third one completes the shard."""
    options = ["sampling.num_inference_steps=40", "output.samples_per_shard=10"]
    assert madgen("generate", job_file, "output.dir=whole", *options).code == 0

    def kept():
        """Of the newest process: it takes over the samples of earlier ones."""
        journals = (tmp_path / "cut").glob("work/open/*.jsonl")
        return max((len(path.read_bytes().splitlines()) for path in journals), default=0)

    least = 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 3)):
        process = start("generate", job_file, "output.dir=cut", *options)
        enough = least + 2
        until(lambda: kept() >= enough or process.poll() is not None, "two more samples")  # noqa: B023 -- called here
        process.send_signal(number)
        least = kept()
        assert process.wait() == code
    result = madgen("generate", job_file, "output.dir=cut", *options)
    assert result.code == 0, result.err
    made = int(re.search(r"(\d+) generated in", result.err).group(1))
    assert 0 < made <= 10 - least
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_closed_stderr_does_not_stop_a_run(job_file, tmp_path):
    """stderr is a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [programs() / "madgen", "generate", job_file]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), stderr=writing, check=False, timeout=600)
    os.close(writing)
    assert done.returncode == 0
    assert len(list((tmp_path / "out/shards").glob("*.json"))) == 4


def test_batch_size_does_not_change_the_images(finished, madgen, job_file, tmp_path):
    import numpy as np

    result = madgen("generate", job_file, "output.dir=batched", "sampling.batch_size=4")
    assert result.code == 0, result.err
    for name in hashes(finished):
        with tarfile.open(finished / "shards" / name) as one, tarfile.open(tmp_path / "batched/shards" / name) as other:
            assert one.getnames() == other.getnames()
            for member in (name for name in one.getnames() if name.endswith(".png")):
                pictures = [np.asarray(Image.open(tar.extractfile(member))).astype(int) for tar in (one, other)]
                assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_prompts_may_set_size_seed_and_negative_prompt(madgen, job_file, tmp_path):
    lines = [{"id": "wide", "prompt": "a", "width": 128}, {"id": "n", "prompt": "b", "negative_prompt": "c", "seed": 5}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert madgen("generate", job_file, "prompts.source=lines.jsonl", "prompts.samples_per_prompt=1").code == 0
    with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
        wide, other = (json.loads(tar.extractfile(f"{key}-0000.json").read()) for key in ("wide", "n"))
        assert Image.open(tar.extractfile("wide-0000.png")).size == (128, 32)
    assert wide["width"] == 128
    assert (other["seed"], other["negative_prompt"]) == (5, "c")


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_image_formats(madgen, job_file, tmp_path, image_format):
    assert madgen("generate", job_file, f"output.format={image_format}", "prompts.limit=1").code == 0
    assert madgen("verify", "out").code == 0
    with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
        assert any(name.endswith(f".{image_format}") for name in tar.getnames())


PEAK = f"""
import resource
try:
    {MADGEN}
finally:
    open("peak", "w").write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(job_file, tmp_path):
    """Compare the peaks of two forks that write 4 and 120 panoramas of 128x1024 px; 116 panoramas are 45 MB."""
    peaks = []
    for count in (2, 60):
        (tmp_path / "many.txt").write_text("".join(f"hills {i}\n" for i in range(count)), encoding="utf-8")
        job = ["prompts.source=many.txt", f"output.dir=m{count}", "sampling.width=1024", "sampling.height=128"]
        steps = ["sampling.num_inference_steps=1", "sampling.guidance_scale=1", "method.mad.steps=0"]
        steps.append("method.views.stride=8")
        process = Forked(("generate", job_file, *job, *steps), tmp_path, environment(), PEAK)
        assert process.wait() == 0, process.output()
        peaks.append(int((tmp_path / "peak").read_text(encoding="utf-8")))
    print(peaks)
    assert peaks[1] - peaks[0] < 30, peaks


def test_signal_while_the_index_is_written(madgen, job_file, tmp_path):
    script = f"""
import os, signal
import madgen.generation.run as run
finish = run.finish
run.finish = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM) or finish(*arguments)
{MADGEN}"""
    process = Forked(("generate", job_file), tmp_path, environment(), script)
    assert process.wait() == 3
    assert "SIGTERM: stopped while writing the index; rerun the same command to write it" in process.output()[1]
    assert not (tmp_path / "out/index.parquet").exists()
    result = madgen("generate", job_file)
    assert (result.code, "; 0 generated\n" in result.err) == (0, True)
    assert (tmp_path / "out/index.parquet").exists()


def test_python_api(job_file, tmp_path):
    script = """
import lightning
from madgen import PanoramaModule, PromptDataModule, ShardWriter, load_job
job = load_job("job.yaml", overrides=["output.dir=api"])
trainer = lightning.Trainer(callbacks=[ShardWriter(job)], use_distributed_sampler=False, accelerator="cpu", devices=1,
    logger=False, enable_checkpointing=False)
trainer.predict(PanoramaModule(job), datamodule=PromptDataModule(job), return_predictions=False)
"""
    process = Forked((), tmp_path, environment(), script)
    assert process.wait() == 0, process.output()
    assert len(list((tmp_path / "api/shards").glob("*.json"))) == 4


def test_shard_of_a_dead_worker_is_taken_over(finished, madgen, job_file, tmp_path):
    (finished / "shards/job-000002.json").unlink()
    (finished / "shards/job-000002.tar").unlink()
    claims, workers = finished / "work/claims", finished / "work/workers"
    claims.mkdir(parents=True)
    workers.mkdir()
    (claims / "job-000002.json").write_text(json.dumps({"worker": "gone", "token": "x", "time": 0}), encoding="utf-8")
    os.utime(claims / "job-000002.json", (0, 0))
    result = madgen("generate", job_file)
    assert result.code == 0, result.err
    assert "; 3 generated in" in result.err
    assert not (finished / "work").exists()
