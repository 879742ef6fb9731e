"""Tables and JSON as other programs write them: dialects, missing values, types."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plans import tasks_of

from madgen import load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset.plan import build_plan
from madgen.prompts.reading import read_prompts
from madgen.utils.errors import UserError
from madgen.utils.seeding import generators


def read(path, **options):
    return read_prompts(PromptsConfig(source=str(path), **options), 64, 128)


def rows(path, **options):
    return [(prompt.id, prompt.text, prompt.seed) for prompt in read(path, **options)]


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


TABLE = [("001", "a hill, at dawn; foggy", 3), ("2", "a lake\twith mist", 5)]


@pytest.mark.parametrize(
    ("name", "delimiter", "start"),
    [
        ("p.csv", ",", ""),
        ("p.csv", ";", ""),
        ("p.csv", "\t", ""),
        ("p.csv", "|", ""),
        ("p.csv", ";", "sep=;\n"),
        ("p.csv", ",", "sep=,\n"),
        ("p.csv", "\t", '"sep=\t"\n'),
        ("p.tsv", "\t", ""),
        ("p.tsv.gz", "\t", ""),
        ("p.csv", ";", "\n\n"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_delimiters_follow_from_the_header(write, name, delimiter, start, end, mark):
    import gzip

    lines = ["id,prompt,seed".replace(",", delimiter)]
    lines += [delimiter.join((identity, f'"{text}"', str(seed))) for identity, text, seed in TABLE]
    content = (mark + start + "\n".join(lines) + "\n").replace("\n", end).encode()
    assert rows(write(name, gzip.compress(content, mtime=0) if name.endswith("gz") else content)) == TABLE


def test_quoted_headers_and_renamed_columns_with_semicolons(write):
    path = write("p.csv", '"Nr";"Bild, Text"\n"1";"a hill"\n')
    assert [prompt.text for prompt in read(path, columns={"prompt": "Bild, Text"})] == ["a hill"]
    assert rows(path, columns={"prompt": "Bild, Text", "id": "Nr"}) == [("1", "a hill", None)]
    assert read(write("q.csv", "a;b,prompt\nx,a hill\n"), columns={"prompt": "prompt"})[0].text == "a hill"


def test_missing_columns_are_listed_in_the_dialect_of_the_file(write):
    with pytest.raises(UserError, match=r"no column 'prompt'; available: 'caption', 'seed'; select one with"):
        read(write("p.csv", "caption;seed\na hill;3\n"))
    with pytest.raises(UserError, match=r"p\.csv:3 has 3 cells, but the header has 2; quote prompts that contain semi"):
        read(write("p.csv", "prompt;seed\na;1\nb; c;2\n"))
    with pytest.raises(UserError, match=r"p\.tsv has no column 'prompt'; available: 'prompt,seed'"):
        read(write("p.tsv", "prompt,seed\na,1\n"))


def test_rows_of_empty_cells_are_skipped(write):
    path = write("p.csv", "id,prompt,seed\n,,\n1,a hill,\n,,\n\n2,a lake,\n,,\n")
    assert rows(path) == [("1", "a hill", None), ("2", "a lake", None)]
    assert read(path).location(1).endswith("p.csv:6")


SAME = [
    "id,prompt,seed\n001,hills,1\n002,sea,\n",
    "id,prompt\n001,hills\n002,sea\n",
    "id,prompt,seed\n1e3,NA,\nNaN,null,18446744073709551615\nTrue,1.50,7\n",
    "prompt;id;width\nN/A;0x1F;\n2024-01-02;00;256\n",
    "id\tprompt\n-0\t1_000\n+1\tinf\n".replace("+1", "1"),
]


@pytest.mark.parametrize("content", SAME)
def test_csv_gives_the_same_prompts_as_a_file_and_in_a_dataset_folder(write, tmp_path, content):
    path = write("data/train.csv", content)
    table = read(path)
    folder = read(f"hf://{tmp_path}/data")
    assert list(folder) == list(table)
    assert (folder.header.prompts_digest, folder.header.keys_digest) == (
        table.header.prompts_digest, table.header.keys_digest,
    )  # fmt: skip
    assert [prompt.id for prompt in table] == [line[:3] for line in ("001", "002")] or content not in SAME[:2]


@pytest.mark.parametrize("name", ["train.tsv", "train.csv.gz", "train.jsonl"])
def test_other_text_formats_in_a_dataset_folder_are_read_as_files(write, tmp_path, name):
    import gzip

    texts = {
        "train.tsv": "id\tprompt\n007\thills\n",
        "train.csv.gz": gzip.compress(b"id,prompt\n007,hills\n", mtime=0),
        "train.jsonl": '{"id": "007", "prompt": "hills"}\n{"id": 8, "prompt": "2024-01-01", "seed": 1.0}\n',
    }
    path = write(f"data/{name}", texts[name])
    assert list(read(f"hf://{tmp_path}/data")) == list(read(path))


ARRAY = [{"id": "a", "prompt": "a hill", "seed": 3}, {"prompt": "a lake", "seed": None, "width": 256.0}]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_arrays_of_objects(write, indent):
    first, second = read(write("p.json", json.dumps(ARRAY, indent=indent)))
    assert (first.id, first.text, first.seed) == ("a", "a hill", 3)
    assert (second.text, second.seed, second.width) == ("a lake", None, 256)


def test_json_arrays_of_strings_objects_of_objects_and_lines(write):
    assert [prompt.text for prompt in read(write("p.json", '["a hill",\n "a lake"]'))] == ["a hill", "a lake"]
    path = write("p.json", json.dumps({"x": {"p": "a hill", "se": 7}}))
    assert rows(path, columns={"prompt": "p", "seed": "se"}) == [("x", "a hill", 7)]
    lines = '\n{"prompt": "a hill"}\n{"prompt": "a lake"}\n'
    assert [prompt.text for prompt in read(write("p.json", lines))] == ["a hill", "a lake"]
    assert rows(write("p.json", json.dumps(ARRAY)), columns={"prompt": "prompt"}, limit=1)[0][2] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"}, 3]', r"p\.json: item 2 must be a JSON object with the key prompt, got 3"),
        ('[{"prompt": "a"}, {"prompt": ""}]', r"p\.json: item 2: the prompt must be a non-empty string"),
        ('[{"prompt": "a", "sed": 1}]', r"p\.json: item 1: unknown field 'sed'"),
        ('[{"prompt": "a"}, {"prompt": "a"}]', r"p\.json\['.*'\]: same id as"),
        ("[]", "contains no prompts"),
        ("3", r"p\.json must be a JSON object such as .* or an array such as .*, got '3'"),
    ],
)
def test_invalid_json_arrays_name_the_item(write, content, message):
    with pytest.raises(UserError, match=message):
        read(write("p.json", content))


@pytest.mark.parametrize("value", ["1.0", "1.", "NaN", '""', '"  "', "null", "1"])
def test_whole_floats_are_integers_and_blanks_are_not_set(write, value):
    wanted = None if value in ("NaN", '""', '"  "', "null") else 1
    json_value = "1.0" if value == "1." else value
    line = f'{{"prompt": "a", "seed": {json_value}, "width": {json_value}}}'
    for name, content in (("p.jsonl", line), ("p.json", f"[{line}]")):
        (prompt,) = read(write(name, content))
        assert (prompt.seed, prompt.width) == (wanted, wanted or 128)
        assert type(prompt.width) is int
    cell = value.strip('"').replace("null", "")
    (prompt,) = read(write("p.csv", f"prompt,seed,width\na,{cell},{cell}\n"))
    assert (prompt.seed, prompt.width) == (wanted, wanted or 128)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.float64(), [3.0, float("nan"), None]),
        (pa.float32(), [3.0, float("nan"), None]),
        (pa.decimal128(20, 2), [Decimal("3.00"), None, None]),
        (pa.int8(), [3, None, None]),
        (pa.uint64(), [3, None, None]),
    ],
)
def test_numbers_of_every_arrow_type_are_seeds(tmp_path, kind, values):
    table = pa.table({"prompt": ["a", "b", "c"], "seed": pa.array(values, kind)})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [prompt.seed for prompt in read(tmp_path / "p.parquet")] == [3, None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "seed": 1.5}', "seed must be an integer in 0..18446744073709551615, got 1.5"),
        ('{"prompt": "a", "seed": 1e300}', "seed must be an integer"),
        ('{"prompt": "a", "seed": 1.8446744073709552e19}', "seed must be an integer"),
        ('{"prompt": "a", "seed": Infinity}', "seed must be an integer"),
        ('{"prompt": "a", "seed": 18446744073709551616}', "seed must be an integer"),
        ('{"prompt": "a", "seed": true}', "seed must be an integer"),
        ('{"prompt": "a", "width": 0.0}', "width must be an integer > 0"),
        ('{"prompt": "a", "id": 1.0}', "id must match"),
    ],
)
def test_other_numbers_are_refused(write, line, message):
    with pytest.raises(UserError, match=message):
        read(write("p.jsonl", line))


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json", "p.parquet"])
def test_seeds_go_up_to_the_largest_of_torch(tmp_path, name):
    largest = 2**64 - 1
    path = tmp_path / name
    if name == "p.parquet":
        pq.write_table(pa.table({"prompt": ["a"], "seed": pa.array([largest], pa.uint64())}), path)
    else:
        line = f'{{"prompt": "a", "seed": {largest}}}'
        path.write_text(
            {"p.csv": f"prompt,seed\na,{largest}\n", "p.jsonl": line, "p.json": f"[{line}]"}[name], encoding="utf-8"
        )
    job = load_job([], [f"prompts.source={path}", "prompts.samples_per_prompt=2", f"prompts.seed={largest}"])
    plan = build_plan(job)
    plan.save(tmp_path / "cache")
    again = build_plan(job, tmp_path / "cache")
    assert again.prompts[0].seed == tasks_of(plan)[0].seed == largest
    assert 0 <= tasks_of(plan)[1].seed < 2**48
    generators([tasks_of(plan)[0].seed])  # torch accepts it
