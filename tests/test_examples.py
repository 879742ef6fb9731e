"""The scripts in docs/examples on a dataset in each format."""

import runpy

import numpy as np
import pytest
from plans import table_of
from processes import ROOT

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.shards.writer import OpenShard
from madgen.types import Prompt, Record

EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
PLAN = Plan("job", table_of((Prompt(f"p{i}", f"fjord {i}", "", 16, 32) for i in range(6)), 1), 1, 4, 0)


@pytest.fixture
def dataset(tmp_path, request):
    directory, job = DatasetDir(tmp_path / "out"), load_job([], ["name=job", f"output.format={request.param}"])
    manifest.create(directory, manifest.manifest(job, PLAN, job_identity(job, PLAN, "float32", WeightIds("w"))))
    for index in range(2):
        shard = OpenShard(directory, PLAN.shard(index), "w")
        for position, task in enumerate(shard.shard.tasks):
            image = np.full((16, 32, 3), position, dtype=np.uint8)
            about = {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 16, "width": 32}
            shard.add(position, encode_sample(Record(task, image, about), request.param, 95))
        shard.publish()
    write_index(directory)
    return directory.root


@pytest.mark.parametrize("dataset", ["png", "jpg", "webp"], indirect=True)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_reads_every_sample(example, dataset, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(example), str(dataset)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"fjord {index}" in said for index in range(6)), said
    assert "(32, 16)" in said or "3, 16, 32)" in said


def test_one_example_per_reading_library():
    assert [path.stem for path in EXAMPLES] == ["load_datasets", "load_pytorch", "load_webdataset"]
