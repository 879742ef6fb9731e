"""Directories of a dataset with two shards."""

import pytest
from open_shards import PLAN, begin

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.layout import DatasetDir


@pytest.fixture
def directory(tmp_path):
    made = DatasetDir(tmp_path / "out")
    manifest.create(made, manifest.manifest(load_job([], ["name=job"]), PLAN, {"a": 1}))
    return made


@pytest.fixture
def whole(directory):
    """Return the bytes of the first shard, generated in one run; the directory stays empty."""
    begin(directory, 4).publish()
    data = directory.tar("job-000000").read_bytes()
    directory.tar("job-000000").unlink()
    directory.sidecar("job-000000").unlink()
    return data
