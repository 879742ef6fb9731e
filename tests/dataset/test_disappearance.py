"""A dataset whose file system disappears while it is used."""

import errno
import shutil

import pytest

from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError


@pytest.fixture
def directory(tmp_path):
    made = DatasetDir(tmp_path / "out")
    made.root.mkdir()
    made.manifest.write_text("{}", encoding="utf-8")
    return made


def lose(directory):
    """As when the disk that the dataset is on has gone: its mount point is there, and empty."""
    shutil.rmtree(directory.root)
    directory.root.mkdir()


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "gone"), NotADirectoryError(20, "gone"), UserError("no dataset")]
)
def test_disappeared_dataset_is_reported_as_such(directory, error):
    with pytest.raises(type(error)), directory.reporting_disappearance():
        raise error
    lose(directory)
    with pytest.raises(type(error)), directory.reporting_disappearance(began=lambda: False):
        raise error
    with pytest.raises(OSError, match="has disappeared") as raised, directory.reporting_disappearance():
        raise error
    assert raised.value.errno == errno.ESTALE


def test_nothing_is_written_at_the_path_of_a_disappeared_dataset(directory):
    directory.make_in_work(directory.claims)
    directory.make_in_work(directory.claims)
    assert directory.claims.is_dir()
    lose(directory)
    with pytest.raises(OSError, match="has disappeared"):
        directory.make_in_work(directory.open_shards)
    assert list(directory.root.iterdir()) == []


def test_dataset_that_disappears_during_loading_is_not_recreated(madgen_here, job_file, finished, monkeypatch):
    out = DatasetDir(finished)
    out.sidecar("job-000001").unlink()
    monkeypatch.setattr("madgen.generation.module.Safety.load", lambda *arguments: lose(out))
    result = madgen_here("generate", job_file)
    assert (result.code, "the dataset has disappeared" in result.err) == (3, True)
    assert list(out.root.iterdir()) == []
