"""The dataset card, read by the libraries that use its header, and with prompts that contain markup."""

import numpy as np
import pytest
import yaml
from plans import table_of

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.licences import LICENCE_COLUMNS
from madgen.dataset.plan import Plan
from madgen.dataset.shards.writer import OpenShard
from madgen.types import Prompt, Record

TEXTS = ["a fjord", "**bold** <script>alert(1)</script> ](x) | `\n---\n# not a heading"] + ["hills"] * 6
PLAN = Plan("job", table_of((Prompt(f"p{i}", text, "", 16, 32) for i, text in enumerate(TEXTS)), 1), 1, 7, 0)


@pytest.fixture
def dataset(tmp_path):
    """8 samples in two shards; the last one's JSON has more in it than the others'."""
    directory, job = DatasetDir(tmp_path / "out"), load_job([], [r'prompts.negative_prompt="```\n---\nx"', "name=job"])
    content = manifest.manifest(job, PLAN, job_identity(job, PLAN, "float32", WeightIds("w")))
    manifest.create(directory, content)
    for index in range(2):
        shard = OpenShard(directory, PLAN.shard(index), "w")
        for position, task in enumerate(shard.shard.tasks):
            image = np.random.default_rng(task.seed).integers(0, 255, (16, 32, 3), dtype=np.uint8)
            about = {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 16, "width": 32}
            about |= {"cut_text": ["fog"]} if index else {}
            scores = {"coherence": 0.25 + 0.5 * index}
            shard.add(position, encode_sample(Record(task, image, {**about, "scores": scores}), "png", 95), scores)
        shard.publish()
    write_index(directory)
    return directory


def test_datasets_loads_the_folder_as_it_is(dataset, tmp_path):
    import datasets

    table = datasets.load_dataset(str(dataset.root), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["__key__"] == [f"p{i}-0000" for i in range(8)]
    assert table["txt"] == TEXTS
    assert table[0]["png"].size == (32, 16)
    assert table[7]["json"]["cut_text"] == ["fog"], "also what the first samples do not have"
    assert "cut_text" not in table[0]["json"]


def test_card_describes_the_dataset_and_escapes_prompts(dataset):
    text = (dataset.root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    header = yaml.safe_load(text.split("\n---\n")[0])
    assert header["license"] == "apache-2.0"
    assert header["size_categories"] == ["n<1K"]
    body = text.split("\n---\n", 1)[1]
    assert [line for line in body.splitlines() if line.startswith(("# ", "---", "```", "<"))] == ["# job"]
    assert "<script" not in body.replace("\\<", "")
    assert "| coherence, mean | 0.3125 of 8 |" in body
    job = yaml.safe_load("\n".join(line[4:] for line in body.split("The job:\n")[1].splitlines()))
    assert job["prompts"]["negative_prompt"] == "```\n---\nx"
    assert {"dir", "upload"}.isdisjoint(job["output"]), "places say nothing of a dataset"
    pictures = sorted((dataset.root / "samples").iterdir())
    assert [f"![](samples/{path.name})" in body for path in pictures] == [True] * 4
    before = {path: path.read_bytes() for path in [*pictures, dataset.root / "README.md"]}
    write_index(dataset)
    assert {path: path.read_bytes() for path in before} == before


def test_index_holds_all_fields_of_the_sidecars(dataset):
    from pyarrow import parquet

    rows = parquet.read_table(dataset.root / "index.parquet").to_pylist()
    entries = list(dataset.entries())
    for row, entry in zip(rows, entries, strict=True):
        assert row["shard"] == entry.shard
        assert row["coherence"] == entry.scores["coherence"]
        assert all(row[name] == value for name, value in entry.as_dict().items() if name != "scores")
        assert [row[name] for name in LICENCE_COLUMNS[:3]] == ["apache-2.0", "yes", "yes"]
        assert row["licence_source"] == "https://www.apache.org/licenses/LICENSE-2.0"
        assert f"{row['prompt_id']}-{row['sample_index']:04d}" == row["key"]
