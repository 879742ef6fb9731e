"""Prompt formats: rows read from each, and errors with location and fix."""

import gzip
import io
import json
import os
import shutil
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madgen.config.loader import load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset.plan import build_plan
from madgen.prompts.cache import plan_key
from madgen.prompts.reading import read_prompts
from madgen.prompts.rows import default_id
from madgen.utils.errors import UserError


def read(path, **options):
    return read_prompts(PromptsConfig(source=str(path), **options), 64, 128)


def texts(table):
    return [prompt.text for prompt in table]


def parquet(**columns):
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


BOM = b"\xef\xbb\xbf"
pack = partial(gzip.compress, mtime=0)  # without the time, test ids are equal in all xdist workers
TWO = {
    "p.txt": b"a hill\n\n a lake \n",
    "p.jsonl": b'{"prompt": "a hill"}\n\n{"prompt": "a lake"}',
    "p.csv": b'prompt\na hill\n\n"a lake"\n',
    "p.json": b'{"0": "a hill", "1": "a lake"}',
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", TWO)
def test_text_formats_with_byte_order_mark_line_ends_and_gzip(write, name, ends, mark, packed):
    content = mark + TWO[name].replace(b"\n", ends)
    path = write(name + ".gz" * packed, pack(content) if packed else content)
    assert texts(read(path)) == ["a hill", "a lake"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_nulls(write, kind):
    table = read(
        write("p.parquet", parquet(prompt=pa.array(["a hill", "a lake"], kind), seed=[None, 3], id=["x", None]))
    )
    assert [(prompt.id, prompt.text, prompt.seed) for prompt in table] == [
        ("x", "a hill", None),
        (default_id("a lake"), "a lake", 3),
    ]


def test_empty_csv_cells_are_not_set(write):
    lines = [
        "id,prompt,negative_prompt,width,height,seed,across",
        'x,"a hill, ""green""",fog,256,32,9,"[""a lake""]"',
        ",two\\lines,,,,,",
        '007,"two',
        'lines",,,,,',
    ]
    first, second, third = read(write("p.csv", "\n".join(lines)))
    assert (first.id, first.text, first.negative, first.width, first.height, first.seed) == (
        "x", 'a hill, "green"', "fog", 256, 32, 9,
    )  # fmt: skip
    assert [region.text for region in first.regions] == ["a lake"]
    assert (second.id, second.width, second.seed) == (default_id("two\\lines"), 128, None)
    assert (third.id, third.text) == ("007", "two\nlines")


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet"])
def test_columns_are_renamed_and_others_ignored(write, name):
    rows = {"caption": ["a hill", "a lake"], "uid": ["h", "l"], "url": ["u", "v"]}
    lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
    content = {
        "p.csv": "caption,uid,url\na hill,h,u\na lake,l,v\n",
        "p.jsonl": "\n".join(lines),
        "p.parquet": parquet(**rows),
    }
    path = write(name, content[name])
    table = read(path, columns={"prompt": "caption", "id": "uid"})
    assert [(prompt.id, prompt.text) for prompt in table] == [("h", "a hill"), ("l", "a lake")]
    assert texts(read(path, columns={"prompt": "caption"})) == ["a hill", "a lake"]
    with pytest.raises(UserError, match=r"prompts\.columns|unknown field 'caption'.*prompts\.columns"):
        read(path)


def test_pattern_reads_files_in_the_order_of_their_paths(write, tmp_path):
    write("b.txt", "b")
    write("a.jsonl", '{"prompt": "a"}')
    write("deep/er/c.txt.gz", pack(b"c"))
    assert texts(read(tmp_path / "*.*")) == ["a", "b"]
    assert texts(read(tmp_path / "**/*.txt*")) == ["b", "c"]
    with pytest.raises(UserError, match="matches no file"):
        read(tmp_path / "*.csv")


def test_duplicates_in_two_files_name_both(write, tmp_path):
    write("a.txt", "x\nsame")
    write("b.txt", "same")
    with pytest.raises(UserError, match=r"b\.txt:1: same id as .*a\.txt:2"):
        read(tmp_path / "*.txt")


@pytest.mark.parametrize("name", ["[ab].txt", "-rf.txt", "new\nline.txt", "*.txt", "a b?.txt"])
def test_existing_file_takes_precedence_over_a_pattern(write, tmp_path, name, monkeypatch):
    write("a.txt", "wrong")
    write(name, "right")
    assert texts(read(tmp_path / name)) == ["right"]
    monkeypatch.chdir(tmp_path)
    assert texts(build_plan(load_job([], [f"prompts.source={json.dumps(name)}"])).prompts) == ["right"]


def test_pattern_is_resolved_against_the_job_file_in_a_folder_with_brackets(write, tmp_path):
    write("jobs [1]/prompts/b.txt", "b")
    write("jobs [1]/prompts/a.txt", "a")
    job = load_job(write("jobs [1]/job.yaml", "prompts: {source: prompts/*.txt}"))
    assert texts(build_plan(job).prompts) == ["a", "b"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets.Dataset.from_dict({"caption": ["a hill", "a lake"], "score": [0.5, 1.5]})


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "csv"])
def test_local_dataset(hub, tmp_path, kind):
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    match kind:
        case "saved":
            hub.save_to_disk(folder)
        case "saved splits":
            datasets.DatasetDict({"train": hub, "test": hub.select([1])}).save_to_disk(folder)
        case "parquet":
            hub.to_parquet(folder / "train.parquet")
        case "csv":
            hub.to_csv(folder / "train.csv")
    before = sorted(tmp_path.rglob("*"))
    table = read(f"hf://{folder}", columns={"prompt": "caption"})
    assert texts(table) == ["a hill", "a lake"]
    assert table.location(1).endswith(":2")
    assert texts(read(f"hf://{folder}", columns={"prompt": "caption"}, limit=1)) == ["a hill"]
    with pytest.raises(UserError, match=r"has no column 'prompt'.*'caption'.*prompts\.columns"):
        read(f"hf://{folder}")
    if kind == "saved splits":
        assert texts(read(f"hf://{folder}", columns={"prompt": "caption"}, split="test")) == ["a lake"]
    if kind != "saved":
        with pytest.raises(UserError, match=r"split 'dev'"):
            read(f"hf://{folder}", columns={"prompt": "caption"}, split="dev")
    else:
        with pytest.raises(UserError, match=r"has no splits, got prompts.split=dev"):
            read(f"hf://{folder}", columns={"prompt": "caption"}, split="dev")
    assert sorted(tmp_path.rglob("*")) == before


def test_hub_dataset_from_the_local_cache(hub, tmp_path, monkeypatch):
    import datasets

    hub.to_parquet(tmp_path / "data/train.parquet")
    datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "first"))
    (built,) = (tmp_path / "first").rglob("*.arrow")
    cached = tmp_path / "cache/owner___my_data/default/0.0.0" / ("0" * 40)
    shutil.copytree(built.parent, cached)
    (cached / built.name).rename(cached / "my_data-train.arrow")
    info = json.loads((cached / "dataset_info.json").read_text(encoding="utf-8"))
    (cached / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "my_data"}), encoding="utf-8")
    for source in ("hf://owner/my_data", "hf://owner/MyData", "hf://owner/my_data/default"):
        assert texts(read(source, columns={"prompt": "caption"})) == ["a hill", "a lake"]
    job = load_job([], ["prompts.source=hf://owner/my_data", "prompts.columns.prompt=caption"])
    key = build_plan(job).key
    assert plan_key(job) == key
    os.utime(cached / "my_data-train.arrow", ns=(1, 1))
    assert plan_key(job) != key
    (tmp_path / "owner/my_data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is ambiguous: a folder owner/my_data exists too"):
        read("hf://owner/my_data", columns={"prompt": "caption"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://nobody/nothing", "in the local cache, or a reachable one on the Hub"),
        ("hf://nobody", "must be hf://owner/name"),
        ("hf://a/b/c/d", "must be hf://owner/name"),
        ("hf://../..//x", "folder .* does not exist"),
        ("hf:///no/folder", "folder /no/folder does not exist"),
    ],
)
def test_missing_datasets_are_refused(hub, source, message):
    with pytest.raises(UserError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"ok\nb\xe9d\n", r"p.txt:2 is not UTF-8 \(byte 4\)"),
        ("p.txt", BOM + b"\xe9", r"p.txt:1 is not UTF-8 \(byte 3\)"),
        ("p.txt.gz", pack(b"a\nb\n\xff"), r"p.txt.gz:3 is not UTF-8 \(byte 4\)"),
        ("p.txt", "a hill".encode("utf-16"), r"p.txt:1 is not UTF-8 \(byte 0\)"),
        ("p.txt", "a hill".encode("utf-16-le"), r"p.txt:1: .*NUL.*UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b\\u0000"}', r"p.jsonl:2: .*NUL"),
        ("p.csv", b"prompt\na\nb\0\n", r"p.csv:3: .*NUL"),
        ("p.csv", b"", "contains no prompts"),
        ("p.csv", b"prompt\n", "contains no prompts"),
        ("p.csv", b"text,id\na,b\n", r"p.csv has no column 'prompt'.*'text', 'id'.*prompts.columns.prompt"),
        ("p.csv", b"prompt,prompt\na,b\n", "duplicate column 'prompt'"),
        ("p.csv", b"prompt,sed\na,b\n", r"unknown field 'sed'.*prompts\.columns"),
        ("p.csv", b"prompt,id\na\n", r"p.csv:2 has 1 cells, but the header has 2"),
        ("p.csv", b"prompt,id\na,x\nb, c,y\n", r"p.csv:3 has 3 cells, but the header has 2"),
        ("p.csv", b'prompt\n"a\n', r"p.csv:2 is not valid CSV"),
        ("p.csv", b"prompt,id\n,x\n", r"p.csv:2: the prompt must be a non-empty string"),
        ("p.csv", b"prompt,width\na,12.5\n", r"p.csv:2: width must be an integer > 0 .pixels., got '12.5'"),
        ("p.csv", b"prompt,seed\na,-1\n", r"p.csv:2: seed must be an integer"),
        ("p.csv", b"prompt,regions\na,[\n", r"p.csv:2: regions is not valid JSON"),
        ("p.csv", "prompt,width\na,\u0661\n".encode(), r"p.csv:2: width must be an integer"),
        ("p.csv", b"prompt,id\na,x/y\n", r"p.csv:2: id must match"),
        ("p.csv", b"prompt,id\na,..\n", r"p.csv:2: id must match"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', r"p.jsonl:1: duplicate key 'prompt'"),
        ("p.jsonl", b'{"prompt": "a"} x', r"p.jsonl:1 is not valid JSON"),
        ("p.jsonl", b'[["prompt", "a"]]', "must be a JSON object"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}', r"p.jsonl:3: unknown field 'text'.*prompts\.columns"),
        ("p.json", b'{"a/b": "x"}', r"p.json\['a/b'\]: id must match"),
        ("p.parquet", b"PAR1 not really", "not a complete Parquet file"),
        ("p.parquet", b"", "not a complete Parquet file"),
        ("p.parquet", parquet(prompt=["a"] * 99)[:-20], "not a complete Parquet file"),
        ("p.parquet", parquet(prompt=["a", None]), r"p.parquet:2: the prompt must be a non-empty string"),
        ("p.parquet", parquet(prompt=[1, 2]), r"p.parquet:1: the prompt must be a non-empty string"),
        ("p.parquet", parquet(prompt=["a"], width=["12"]), r"p.parquet:1: width must be an integer"),
        ("p.parquet", parquet(text=["a"]), r"^[^ ]*p.parquet has no column 'prompt'.*prompts.columns.prompt=...$"),
        ("p.parquet.gz", pack(parquet(prompt=["a"])), "decompress the file"),
        ("p.txt.gz", pack(b"a hill\n" * 9999)[:-20], "not a complete gzip file"),
        ("p.txt.gz", b"a hill", "not a complete gzip file"),
        ("p.jsonl.gz", b"", "contains no prompts"),
        ("p.gz", b"", "must end in"),
        ("p", b"a", "must end in"),
    ],
)
def test_invalid_files_are_refused_with_location_and_fix(write, name, content, message):
    with pytest.raises(UserError, match=message):
        read(write(name, content))


def test_overlong_line_is_refused(write, monkeypatch):
    monkeypatch.setattr("madgen.prompts.readers._lines.MAX_LINE", 3 << 20)
    with pytest.raises(UserError, match=r"p.txt:2 is longer than 3 MiB; write one prompt per line"):
        read(write("p.txt", b"a\n" + b"x" * (5 << 20)))


def test_options_that_do_not_apply_are_refused(write):
    path = write("p.txt", "a")
    with pytest.raises(UserError, match=r"prompts.columns does not apply to .*p.txt"):
        read(path, columns={"prompt": "x"})
    with pytest.raises(UserError, match=r"prompts.split=test needs a Hugging Face dataset"):
        read(path, split="test")
    with pytest.raises(UserError, match=r"has no column 'x' \(prompts.columns\)"):
        read(write("p.csv", "prompt\na"), columns={"prompt": "x"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused(write):
    path = write("p.txt", "a")
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read prompts.source=.*p.txt: Permission denied"):
        read(path)


def test_paths_that_are_not_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "d.txt").mkdir()
    for name, message in (
        ("p.txt", "not a regular file"),
        ("gone.txt", "not a regular file"),
        ("d.txt", "is a directory"),
        ("x" * 300 + ".txt", "does not exist"),
        ("nul\0.txt", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
