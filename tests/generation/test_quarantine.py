"""Quarantined samples: generated, recorded, retried."""

import json

import pytest
import torch

from madgen.dataset.layout import DatasetDir
from madgen.dataset.verify import verify
from madgen.sampling.sampler import PanoramaSampler


@pytest.fixture
def overflow(monkeypatch):
    """Make the latents of chosen seeds NaN in any precision."""
    sample = PanoramaSampler.sample_latents
    bad = set()

    def sampled(self, batch, *arguments, **options):
        latents = sample(self, batch, *arguments, **options)
        for position, seed in enumerate(batch.seeds):
            if seed in bad or "all" in bad:
                latents[position] = torch.nan
        return latents

    monkeypatch.setattr(PanoramaSampler, "sample_latents", sampled)
    return bad


def seeds(folder):
    return [entry.seed for entry in DatasetDir(folder).entries()]


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shards/*.tar"))}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_retry_quarantined(madgen_here, job_file, tmp_path, overflow, batch_size):
    options = [f"sampling.batch_size={batch_size}", "quarantine.max_share=1"]
    assert madgen_here("generate", job_file, "output.dir=good", *options).code == 0
    chosen = seeds(tmp_path / "good")[4:6]
    overflow.update(chosen)
    result = madgen_here("generate", job_file, *options)
    assert result.code == 4, result.err
    assert "2 quarantined, see out/quarantine.jsonl" in result.err
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["seed"], line["reason"]) for line in lines] == [(seed, "not_finite") for seed in chosen]
    assert madgen_here("verify", "out").code == 4
    state = json.loads(madgen_here("status", "out", "--json").out)
    assert (state["done"], state["quarantined"], state["complete"]) == (8, 2, True)
    again = madgen_here("generate", job_file, *options)
    assert (again.code, "; 0 generated\n" in again.err) == (4, True)

    overflow.clear()
    result = madgen_here("generate", job_file, *options, "retry=quarantined")
    assert result.code == 0, result.err
    assert "; 2 generated in" in result.err
    assert tars(tmp_path / "out") == tars(tmp_path / "good")
    assert not (tmp_path / "out/quarantine.jsonl").exists()
    assert not (tmp_path / "out/work").exists()


@pytest.mark.slow
def test_failed_retry_keeps_the_other_samples(madgen_here, job_file, tmp_path, overflow):
    assert madgen_here("generate", job_file, "output.dir=good").code == 0
    overflow.add(seeds(tmp_path / "good")[4])
    assert madgen_here("generate", job_file).code == 4
    before = tars(tmp_path / "out")
    assert madgen_here("generate", job_file, "retry=quarantined").code == 4
    assert tars(tmp_path / "out") == before
    assert verify(DatasetDir(tmp_path / "out")).complete


def test_too_many_failures_stop_the_run(madgen_here, job_file, tmp_path, overflow):
    overflow.add("all")
    result = madgen_here("generate", job_file, "quarantine.window=3")
    assert result.code == 3, result.err
    assert "3 of the last 3 samples failed, more than quarantine.max_share=0.2 allows" in result.err
    made = sum(
        len(json.loads(path.read_text(encoding="utf-8"))["quarantined"])
        for path in (tmp_path / "out/shards").glob("*.json")
    )
    assert 3 <= made < 10
    overflow.clear()
    result = madgen_here("generate", job_file, "retry=quarantined")
    assert result.code == 0, result.err
    assert verify(DatasetDir(tmp_path / "out")).present == 10


def test_verify_repair_then_generate_restores_the_dataset(madgen_here, job_file, tmp_path):
    assert madgen_here("generate", job_file).code == 0
    before = tars(tmp_path / "out")
    tar = tmp_path / "out/shards/job-000001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    tar.write_bytes(data)
    (tmp_path / "out/shards/job-000002.tar").unlink()
    assert madgen_here("verify", "out").code == 1
    result = madgen_here("verify", "out", "--repair")
    assert (result.code, "2 shards marked for regeneration, 4 samples to generate" in result.err) == (1, True), (
        result.err
    )
    result = madgen_here("generate", job_file)
    assert (result.code, "; 4 generated in" in result.err) == (0, True), result.err
    assert tars(tmp_path / "out") == before
    assert madgen_here("verify", "out").code == 0
    assert not (tmp_path / "out/work").exists()
