"""Counting tokens without transformers gives the tokens of transformers."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from madgen.hub.tokenizers import TextLimit, cut_texts, text_limit
from madgen.hub.weights import ModelFiles

DEMO = ModelFiles.of("demo", None, None).pretrained
WORDS = st.sampled_from(
    ["mountains", "it's", "<|endoftext|>", "<|startoftext|>", "42", "Éà", "日本語", "\t\n ", "🏔️", "--", "İ", "x" * 30]
)
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=12)), max_size=60).map(" ".join)


@pytest.fixture(scope="module")
def limit() -> TextLimit:
    found = text_limit(("tokenizer",), ModelFiles(DEMO))
    assert found is not None
    return found


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_tokens_equal_those_of_transformers(limit, text):
    (counter,) = limit.load()
    reference = CLIPTokenizer.from_pretrained(DEMO, subfolder="tokenizer")
    ids = reference(text, truncation=False).input_ids
    assert counter.backend_tokenizer.encode(text, add_special_tokens=False).ids == ids[1:-1]
    assert cut_texts([counter], [text]) == cut_texts([reference], [text])


def test_a_single_file_of_tokenizers_is_enough(limit, tmp_path):
    """Checkpoints saved by transformers 5 have no vocab.json."""
    shutil.copytree(f"{DEMO}/tokenizer", tmp_path / "tokenizer")
    before = limit.load()[0].backend_tokenizer.encode("foggy lakes of Iceland, 4k").ids
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).unlink()
    again = text_limit(("tokenizer",), ModelFiles(str(tmp_path)))
    assert again.load()[0].backend_tokenizer.encode("foggy lakes of Iceland, 4k").ids == before


@pytest.mark.parametrize("content", ["{}", "[]", json.dumps({"model": {"vocab": 3, "merges": 4}})])
def test_damaged_files_count_nothing(limit, tmp_path, content):
    shutil.copytree(f"{DEMO}/tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "vocab.json").unlink()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content, encoding="utf-8")
    assert text_limit(("tokenizer",), ModelFiles(str(tmp_path))).load() is None
