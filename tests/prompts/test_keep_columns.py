"""Further columns of prompt files, from the file to the sample's JSON, the index, `load_dataset` and `--where`."""

import csv
import datetime
import json
import tarfile
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madgen.config.schema import PromptsConfig
from madgen.dataset.kept_columns import KeptColumns
from madgen.prompts.reading import read_prompts
from madgen.prompts.table import PromptTable
from madgen.utils.errors import UserError

ROWS = [
    {"id": "001", "prompt": "a hill", "category": "alps", "rating": "7", "code": "007"},
    {"id": "002", "prompt": "a lake", "category": "", "rating": "2.5", "code": "1"},
    {"id": "003", "prompt": "the sea", "category": "coast", "rating": "", "code": "2"},
]
NAMES = ["category", "rating", "code"]


def read(path, **options):
    return read_prompts(PromptsConfig(source=str(path), **options), 64, 128)


def write(folder, name, rows=ROWS):
    path = folder / name
    if name.endswith("csv"):
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    rows = [{key: value or None for key, value in row.items()} for row in rows]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        texts = [json.dumps(row) for row in rows]
        path.write_text("\n".join(texts) if name.endswith("jsonl") else f"[{','.join(texts)}]", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json", "p.parquet", "hf"])
def test_columns_are_kept_in_every_format(tmp_path, name):
    path = write(tmp_path, "p.csv" if name == "hf" else name)
    source = f"hf://{tmp_path}" if name == "hf" else path
    wanted = [{key: row[key] or None for key in NAMES} for row in ROWS]
    table = read(source, keep_columns="all")
    assert [prompt.columns for prompt in table] == wanted
    assert [prompt.id for prompt in table] == ["001", "002", "003"]
    assert [prompt.columns for prompt in read(source, keep_columns=["code"])] == [{"code": row["code"]} for row in ROWS]
    renamed = read(source, keep_columns=["prompt", "id"], columns={"prompt": "category"}, limit=1)
    assert [(prompt.text, prompt.columns) for prompt in renamed] == [("alps", {"prompt": "a hill", "id": "001"})]
    with pytest.raises(UserError, match=r"unknown field 'category'.*prompts\.keep_columns"):
        read(source)
    with pytest.raises(UserError, match=r"no column 'cat' \(prompts\.keep_columns\)|no row of .* has 'cat'"):
        read(source, keep_columns=["cat"])
    table.save(tmp_path / "t.arrow")
    assert list(PromptTable.open(tmp_path / "t.arrow")) == list(table)


def test_kept_columns_are_part_of_the_digest(tmp_path):
    path = write(tmp_path, "p.csv")
    digests = [read(path, keep_columns=keep).header.prompts_digest for keep in ("all", ["code"], ["rating", "code"])]
    digests.append(read(path, columns={"prompt": "prompt", "id": "id"}).header.prompts_digest)
    write(tmp_path, "p.csv", [{**row, "code": "x"} for row in ROWS])
    digests.append(read(path, keep_columns="all").header.prompts_digest)
    assert len(set(digests)) == 5


def test_values_of_every_type_become_json(tmp_path):
    table = pa.table(
        {
            "prompt": ["a"],
            "day": [datetime.date(2026, 1, 2)],
            "at": [datetime.datetime(2026, 1, 2, 3, 4)],
            "price": [Decimal("1.50")],
            "nan": [float("nan")],
            "tags": [["x", "y"]],
            "size": [{"w": 1, "h": None}],
            "big": pa.array([2**64 - 1], pa.uint64()),
            "flag": [True],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (prompt,) = read(tmp_path / "p.parquet", keep_columns="all")
    assert prompt.columns == {
        "day": "2026-01-02", "at": "2026-01-02T03:04:00", "price": 1.5, "nan": None, "tags": ["x", "y"],
        "size": {"w": 1, "h": None}, "big": 2**64 - 1, "flag": True,
    }  # fmt: skip
    assert hash(prompt)
    pq.write_table(pa.table({"prompt": ["a"], "raw": [b"x"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet:1: column 'raw' holds a bytes"):
        read(tmp_path / "p.parquet", keep_columns="all")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "x": Infinity}', encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl:1: column 'x' is inf"):
        read(tmp_path / "p.jsonl", keep_columns="all")


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([1, None, -3], pa.int64(), [1, None, -3]),
        ([2**64 - 1, 0], pa.uint64(), [2**64 - 1, 0]),
        ([1, 0.5], pa.float64(), [1.0, 0.5]),
        ([True, None], pa.bool_(), [True, None]),
        (["7", "12", None], pa.int64(), [7, 12, None]),
        (["7", "2.5"], pa.float64(), [7.0, 2.5]),
        (["7", "007"], pa.string(), ["7", "007"]),
        (["1.50", "2.5"], pa.string(), ["1.50", "2.5"]),
        (["nan", "inf", "1e5", "-0"], pa.string(), ["nan", "inf", "1e5", "-0"]),
        (["a", 3, True], pa.string(), ["a", "3", "true"]),
        ([["x"], {"b": 1}], pa.string(), ['["x"]', '{"b": 1}']),
        ([None], pa.string(), [None]),
        ([2**70], pa.string(), [str(2**70)]),
    ],
)
def test_types_of_index_columns(values, kind, stored):
    from madgen.dataset.format import SampleEntry

    rows = [{"x": value, "seed": value} for value in values]
    kept = KeptColumns.infer(rows)
    assert kept.types == {"x": kind, "column_seed": kind}
    assert kept.names == {"x": "x", "column_seed": "seed"}
    entries = [SampleEntry("a-0000", 0, "p", 0, 0, "", 1, 1, columns=row) for row in rows]
    columns = [kept.values(entry)["x"] for entry in entries]
    assert columns == stored
    assert pa.array(columns, kind).to_pylist() == stored


@pytest.mark.parametrize("keep", ["some", [], [""], ["a", "a"], [3], {"a": "b"}, True])
def test_invalid_choices_of_columns_are_refused(keep):
    with pytest.raises(UserError, match=r"prompts\.keep_columns (must be all, a list|names a column twice)"):
        PromptsConfig(keep_columns=keep)


def test_text_files_have_no_columns_to_keep(tmp_path):
    (tmp_path / "p.txt").write_text("a", encoding="utf-8")
    (tmp_path / "p.json").write_text('{"0": "a"}', encoding="utf-8")
    for name in ("p.txt", "p.json"):
        with pytest.raises(UserError, match=rf"prompts\.keep_columns does not apply to .*{name}"):
            read(tmp_path / name, keep_columns="all")


def test_kept_columns_reach_the_dataset(job_file, madgen_here, tmp_path):
    import datasets

    largest = 2**64 - 1
    write(tmp_path, "p.csv", [{**row, "seed": largest if row["id"] == "001" else ""} for row in ROWS])
    options = ["prompts.source=p.csv", "prompts.keep_columns=all", "output.key_prefix=a_", "prompts.shuffle=true"]
    assert madgen_here("generate", job_file, *options).code == 0
    stored = {}
    for shard in sorted((tmp_path / "out/shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    sample = json.load(tar.extractfile(member))
                    assert member.name == sample["key"] + ".json" == f"a_{sample['prompt_id']}-{member.name[-9:]}"
                    stored[sample["key"]] = sample
    by_id = {row["id"]: {name: row[name] or None for name in NAMES} for row in ROWS}
    assert len(stored) == 6
    assert all(sample["columns"] == by_id[sample["prompt_id"]] for sample in stored.values())
    index = pq.read_table(tmp_path / "out/index.parquet")
    assert index.schema.field("rating").type == pa.float64()
    assert index.schema.field("code").type == index.schema.field("category").type == pa.string()
    assert {row["prompt_id"]: row["rating"] for row in index.to_pylist()} == {"001": 7.0, "002": 2.5, "003": None}
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert {row["__key__"]: row["json"]["columns"] for row in loaded} == {
        key: sample["columns"] for key, sample in stored.items()
    }
    assert index.schema.field("seed").type == pa.uint64()
    assert largest in index.column("seed").to_pylist()
    assert madgen_here("verify", "out").code == 0
    keys = madgen_here("filter", "out", "--where", f"seed == {largest}", "--keys", "keys.txt")
    assert (keys.code, (tmp_path / "keys.txt").read_text(encoding="utf-8")) == (0, "a_001-0000\n")
    where = "rating > 3 and sample_index == 1 and prompt_id == '001' and category contains 'ALP'"
    assert madgen_here("filter", "out", "--where", where, "-o", "alps").code == 0
    assert madgen_here("verify", "alps").code == 0
    assert pq.read_table(tmp_path / "alps/index.parquet").to_pylist()[0]["category"] == "alps"
    refused = madgen_here("filter", "out", "--where", "categry == 'x'", "-o", "none")
    assert (refused.code, "did you mean 'category'?" in refused.err) == (2, True)
    again = madgen_here("generate", job_file, *options, "prompts.keep_columns=[code]")
    assert again.code == 2
    assert "prompts.keep_columns" in again.err
