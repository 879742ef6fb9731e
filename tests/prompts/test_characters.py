"""Invisible and invalid characters in prompts: the same rule in every format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madgen.config.schema import PromptsConfig
from madgen.prompts.reading import read_prompts
from madgen.utils.errors import UserError

FORMATS = ("txt", "csv", "tsv", "jsonl", "json", "parquet", "hf csv", "hf saved")


def write(folder, kind, texts):
    """Write a prompt file of each format; return its source and the location of the second prompt."""
    path = folder / f"p.{kind.split()[-1]}"
    if kind == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
        return path, "p.txt:2"
    if kind in ("csv", "tsv", "hf csv"):
        path = folder / f"p.{kind[-3:]}"
        path.write_text("\n".join(["prompt", *(f'"{text}"' for text in texts)]), encoding="utf-8")
        return (f"hf://{folder}", f"{folder}:2") if "hf" in kind else (path, f"p.{kind}:3")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
        return path, "p.jsonl:2"
    if kind == "json":
        path.write_text(json.dumps([{"prompt": text} for text in texts], indent=1), encoding="utf-8")
        return path, "p.json: item 2"
    if kind == "parquet":
        pq.write_table(pa.table({"prompt": texts}), path)
        return path, "p.parquet:2"
    import datasets

    datasets.Dataset.from_dict({"prompt": texts}).save_to_disk(folder / "saved")
    return f"hf://{folder}/saved", "/saved:2"


def read(source, **options):
    return [prompt.text for prompt in read_prompts(PromptsConfig(source=str(source), **options), 64, 128)]


INVALID = {
    "a hill\u200bat dawn": "U+200B ZERO WIDTH SPACE (character 7)",
    "a hill\ufeff at dawn": "U+FEFF ZERO WIDTH NO-BREAK SPACE (character 7)",
    "a hill\u2060": "U+2060 WORD JOINER (character 7)",
    "\u200b": "U+200B ZERO WIDTH SPACE (character 1)",
    "a\u200d hill": "U+200D ZERO WIDTH JOINER (character 2)",
    "soft\xadhyphen": "U+00AD SOFT HYPHEN (character 5)",
    "a hill \U000e0041": "U+E0041 TAG LATIN CAPITAL LETTER A (character 8)",
    "caf\ufffd": "U+FFFD REPLACEMENT CHARACTER (character 4)",
    "\u200e": "a non-empty string with a visible character, got '\\u200e'",
    "\u2800\ufe0f": "a non-empty string with a visible character, got '\\u2800\\ufe0f'",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_invisible_characters_are_refused_by_line_and_name(tmp_path, kind):
    for number, (text, problem) in enumerate(INVALID.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, location = write(folder, kind, ["plain", text, "also plain"])
        with pytest.raises(UserError) as refused:
            read(source)
        assert problem in str(refused.value)
        assert location in str(refused.value)


VALID = [
    "a hill at dawn",
    "naïve “quotes” – dashes",
    "família 👨\u200d👩\u200d👧 at the beach",
    "a rainbow flag 🏳\ufe0f\u200d🌈",
    "the flag of Scotland 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f over a glen",
    "کوه\u200cها در سپیده\u200cدم",  # Persian with zero width non-joiners
    "ක්\u200dෂේත්\u200dරය",  # Sinhala with zero width joiners
    "山々\u3000夜明け",
    "葛\U000e0100城",  # with a variation selector
    "a hill\u00a0at dawn",
    "\u200fהרים בשקיעה\u200e 2",  # Hebrew with directions
    "a \u202ehill\u202c",
    "a \x1b[31mhill",  # shown escaped where it could control a terminal
]


@pytest.mark.parametrize("kind", FORMATS)
def test_characters_with_a_meaning_are_kept(tmp_path, kind):
    assert read(write(tmp_path, kind, VALID)[0]) == VALID


@pytest.mark.parametrize("kind", FORMATS)
def test_byte_order_marks_at_the_start_of_a_prompt_are_removed(tmp_path, kind):
    texts = ["\ufeffa hill", "\ufeff\ufeffa lake", "a river"]
    assert read(write(tmp_path, kind, texts)[0]) == ["a hill", "a lake", "a river"]


def test_concatenated_text_files_are_read_as_their_lines(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "p.txt").write_bytes(mark + b"a hill\n" + mark + b"a lake\n" + mark + b"\n" + mark)
    assert read(tmp_path / "p.txt") == ["a hill", "a lake"]
    (tmp_path / "p.jsonl").write_bytes(mark + b'{"prompt": "a hill"}\n' + mark + b'{"prompt": "a lake"}\n')
    assert read(tmp_path / "p.jsonl") == ["a hill", "a lake"]
    (tmp_path / "p.csv").write_bytes(mark + b"id,prompt\n1,a hill\n" + mark + b"id,prompt\n2,a lake\n")
    with pytest.raises(UserError, match=r"p\.csv:3 repeats the header, as in concatenated files; remove the line"):
        read(tmp_path / "p.csv")


@pytest.mark.parametrize("field", ["negative_prompt", "across", "regions"])
def test_other_texts_of_a_row_follow_the_same_rule(tmp_path, field):
    value = {"negative_prompt": "fog\u200b", "across": ["fog\u200b"]}.get(
        field, [{"mask": [0, 0, 8, 8], "prompt": "fog\u200b"}]
    )
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a hill", field: value}), encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl:1.*U\+200B ZERO WIDTH SPACE"):
        read(tmp_path / "p.jsonl")
