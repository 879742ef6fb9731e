"""Directories of a dataset with two shards."""

import pytest
from open_shards import PLAN, begin
from plans import new_dataset


@pytest.fixture
def directory(tmp_path):
    return new_dataset(PLAN, tmp_path)


@pytest.fixture
def whole(directory):
    """Return the bytes of the first shard, generated in one run; the directory stays empty."""
    begin(directory, 4).publish()
    data = directory.tar("job-000000").read_bytes()
    directory.tar("job-000000").unlink()
    directory.sidecar("job-000000").unlink()
    return data
