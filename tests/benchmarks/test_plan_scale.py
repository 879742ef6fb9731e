import pyarrow.parquet as pq
import pytest
from plan_scale import FORMATS, captions, plan, write_prompts

from madgen.config.schema import PromptsConfig
from madgen.prompts.reading import read_prompts


def test_captions_are_distinct_and_of_realistic_length():
    made = list(captions(5000))
    assert len(set(made)) == 5000
    assert all(20 <= len(caption.encode()) <= 80 for caption in made)
    assert list(captions(20, 10)) == made[10:20]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_prompts(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("plan_scale.ROW_GROUP", 20)
    path = tmp_path / f"p.{kind.partition('+')[0]}"
    write_prompts(path, kind, 50)
    table = read_prompts(PromptsConfig(source=str(path)), 128, 768)
    assert [prompt.text for prompt in table] == list(captions(50))
    assert kind != "parquet" or pq.ParquetFile(path).num_row_groups == 3


@pytest.mark.slow
def test_plan_reports_time_and_memory_of_a_new_process(tmp_path):
    path = tmp_path / "p.txt"
    write_prompts(path, "txt", 50)
    cost = plan(tmp_path, path)
    assert cost.seconds > 0
    assert cost.peak_mb > 0
