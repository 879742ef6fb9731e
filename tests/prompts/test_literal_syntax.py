"""Warnings about comments, options and weights of other programs."""

import pytest

from madgen.config.schema import PromptsConfig
from madgen.prompts.literal_syntax import literal_syntax
from madgen.prompts.reading import read_prompts


def warnings(path, batch_rows=3, **options):
    return literal_syntax(read_prompts(PromptsConfig(source=str(path), **options), 64, 128, batch_rows))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("a hill --negative_prompt fog", "--negative_prompt"),
        ('--prompt "a hill" --steps 20', "--prompt"),
        ("a hill --n blurry --w 512 --h 512", "--n"),
        ("a hill --ar 16:9", "--ar"),
        ("a (hill:1.3) at dawn", "(hill:1.3)"),
        ("a (foggy hill:2)", "(foggy hill:2)"),
        ("a hill <lora:alps:0.8>", "<lora:alps:0.8>"),
    ],
)
def test_syntax_of_other_programs_is_reported_once(tmp_path, line, shown):
    path = tmp_path / "p.txt"
    path.write_text("\n".join([*(f"plain {number}" for number in range(7)), line, f"{line} again"]), encoding="utf-8")
    (warning,) = warnings(path)
    assert warning.startswith(f"{path}:8 contains {shown!r}, which is sampled literally")


@pytest.mark.parametrize(
    "line",
    [
        "a hill -- at dawn",
        "a hill (at dawn)",
        "the ratio (16:9) of a frame",
        "a well-known hill: at dawn",
        "a <hill>",
        "12:30 (noon)",
        "é (a",
    ],
)
def test_ordinary_punctuation_is_not_reported(tmp_path, line):
    path = tmp_path / "p.txt"
    path.write_text(
        f"{line}\n:1.3) b\n--\nn x\n", encoding="utf-8"
    )  # the start of a match, continued in the next prompt
    assert warnings(path) == []


def test_comments_at_the_start_of_a_file_are_reported(tmp_path):
    (tmp_path / "a.txt").write_text("a hill\n#sunset\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n# my list\na lake\n", encoding="utf-8")
    (warning,) = warnings(tmp_path / "*.txt")
    assert warning.startswith(f"{tmp_path}/b.txt:2 starts with # and is sampled as a prompt ('# my list')")
    assert 'prompts.comments="#"' in warning
    assert len(warnings(tmp_path / "*.txt", shuffle=True)) == 1
    assert warnings(tmp_path / "*.txt", comments="#") == []
    (tmp_path / "p.jsonl").write_text('{"prompt": "#sunset"}', encoding="utf-8")
    assert warnings(tmp_path / "p.jsonl") == []


def test_lines_with_a_hash_and_a_blank_are_reported_anywhere(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a hill\n#sunset\n# my lakes\n# more\na lake\n", encoding="utf-8")
    (warning,) = warnings(path)
    assert warning.startswith(f"{path}:3 starts with # and is sampled as a prompt ('# my lakes')")
    assert warnings(path, comments="#") == []


def test_headers_of_text_files_are_reported(tmp_path):
    (tmp_path / "p.txt").write_text("Prompt\na hill\ncaption\n", encoding="utf-8")
    (warning,) = warnings(tmp_path / "p.txt")
    assert warning.startswith(f"{tmp_path}/p.txt:1 is 'Prompt', which looks like a header and is sampled as a prompt")
    (tmp_path / "p.csv").write_text("prompt\na hill\n", encoding="utf-8")
    assert warnings(tmp_path / "p.csv") == []


def test_plan_warns(job_file, madgen_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("# list\na (hill:1.3)\n", encoding="utf-8")
    result = madgen_here("plan", job_file)
    assert result.code == 0
    assert result.err.count("sampled literally") == result.err.count("prompts.comments") == 1
    clean = madgen_here("plan", job_file, "prompts.comments=#", "prompts.limit=1")
    assert clean.code == 0
    assert "prompts.comments" not in clean.err
