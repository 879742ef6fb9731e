import json

import pytest

from madgen.config.schema import PromptsConfig
from madgen.prompts.reading import read_prompts
from madgen.prompts.rows import default_id
from madgen.utils.errors import UserError


def read(path, **options):
    return read_prompts(PromptsConfig(source=str(path), **options), 64, 128)


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def test_txt_has_one_prompt_per_line(write):
    prompts = read(write("p.txt", b"\xef\xbb\xbfa hill\r\n\n  a lake  \n"), negative_prompt="blur")
    assert [prompt.text for prompt in prompts] == ["a hill", "a lake"]
    assert [prompt.id for prompt in prompts] == [default_id("a hill"), default_id("a lake")]
    assert {(prompt.negative, prompt.height, prompt.width, prompt.seed) for prompt in prompts} == {
        ("blur", 64, 128, None)
    }


def test_jsonl_fields_override_the_job(write):
    line = {"id": "x", "prompt": "p", "negative_prompt": "n", "width": 256, "height": 32, "seed": 9}
    first, second = read(write("p.jsonl", json.dumps(line) + "\n\n" + json.dumps({"prompt": "q", "seed": None})))
    assert (first.id, first.text, first.negative, first.width, first.height, first.seed) == ("x", "p", "n", 256, 32, 9)
    assert (second.width, second.seed) == (128, None)


def test_keys_of_a_json_object_are_ids(write):
    prompts = read(write("p.json", '{"0": "a lounge", "1": "a street"}'))
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("0", "a lounge"), ("1", "a street")]


def test_default_id_does_not_depend_on_the_file(write):
    assert read(write("a.txt", "a hill"))[0].id == read(write("b.jsonl", '{"prompt": "a hill"}'))[0].id


def test_limit_keeps_the_first_prompts(write):
    assert len(read(write("p.txt", "a\nb\nc"), limit=2)) == 2


def test_duplicates_are_refused_skipped_or_renamed(write):
    path = write("p.txt", "a\nb\na\na")
    with pytest.raises(UserError, match=r"p.txt:3: same id as .*p.txt:1"):
        read(path)
    assert [prompt.text for prompt in read(path, on_duplicate="skip")] == ["a", "b"]
    renamed = [prompt.id for prompt in read(path, on_duplicate="rename")]
    assert renamed == [default_id("a"), default_id("b"), default_id("a") + "-2", default_id("a") + "-3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "contains no prompts"),
        ("p.txt", " \n\n", "contains no prompts"),
        ("p.txt", b"ok\n\xff\xfe", r"p.txt:2 is not UTF-8"),
        ("p.doc", "a", r"must end in .csv, .json, .jsonl, .parquet, .tsv, .txt, got '.doc'"),
        ("p.jsonl", "{", r"p.jsonl:1 is not valid JSON"),
        ("p.jsonl", '"a"', r"must be a JSON object"),
        ("p.jsonl", '{"prompt": " "}', "must be a non-empty string"),
        ("p.jsonl", '{"prompt": 3}', "must be a non-empty string"),
        ("p.jsonl", '{"prompt": "a", "sed": 1}', "unknown field 'sed'"),
        ("p.jsonl", '{"prompt": "a", "id": "a.b"}', "id must match"),
        ("p.jsonl", '{"prompt": "a", "id": "../x"}', "id must match"),
        ("p.jsonl", '{"prompt": "a", "id": ""}', "id must match"),
        ("p.jsonl", '{"prompt": "a", "id": true}', "id must match"),
        ("p.jsonl", '{"prompt": "a", "width": "256"}', "width must be an integer > 0"),
        ("p.jsonl", '{"prompt": "a", "height": 0}', "height must be an integer > 0 .pixels., got 0"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed must be an integer in 0"),
        ("p.jsonl", '{"prompt": "a\\ud800"}', "surrogate"),
        ("p.json", "[1]", "must be a JSON object"),
        ("p.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_errors_name_the_row(write, name, content, message):
    with pytest.raises(UserError, match=message):
        read(write(name, content))


def test_missing_files_and_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "no.txt")
    with pytest.raises(UserError, match="is a directory"):
        read(tmp_path)


def test_digests_are_those_of_earlier_versions(write):
    lines = [
        {"id": "a", "prompt": "a hill", "seed": 3, "width": 256},
        {"prompt": "naïve “sea”", "across": ["fog"], "negative_prompt": "x"},
        {"prompt": "plain"},
    ]
    header = read(write("p.jsonl", "\n".join(map(json.dumps, lines))), samples_per_prompt=2).header
    assert header.prompts_digest == "940baa29cd7e405f31d49ff1cc44cb15"  # written by a version without kept columns
    assert header.keys_digest == "1fe421702851c253cc7636527dbba64b8275fe99b97f641060fbe8735c8f273f"
