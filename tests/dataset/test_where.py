import sqlite3
from dataclasses import replace

import pytest

from madgen.dataset.filtering.selection import MAX_LENGTH, load, parse
from madgen.dataset.format import SampleEntry
from madgen.dataset.kept_columns import KeptColumns
from madgen.utils.errors import UserError

SCORES = {"coherence": 0.9, "seam": 1.1}
ENTRY = SampleEntry("a-0001", 7, "Snow on 'old' hills", 0, 512, "00", 32, 64, SCORES, "job-000000")


def matches(expression):
    where = parse(expression)
    return load([ENTRY])[0].execute(f"SELECT count(*) FROM samples WHERE {where.sql}", where.values).fetchone() == (1,)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("coherence > 0.8 and seam < 1.2", True),
        ("coherence > 0.8 and seam < 1.1", False),
        ("coherence>.9 or seam<=1.1", True),
        ("0.8 < coherence <= 0.9 < seam", True),
        ("0.8 < coherence < 0.9", False),
        ("not coherence > 0.8", False),
        ("not not coherence > 0.8", True),
        ("coherence > 0.95 or coherence > 0.8 and seam > 1", True),
        ("(coherence > 0.95 or coherence > 0.8) and seam > 2", False),
        ("coherence < seam", True),
        ("seed == 7 and height != width", True),
        ("seed > -1", True),
        ("width >= 64 and width <= 64.0", True),
        ("seed == 9223372036854775807", False),
        ("  seed == 7  ", True),
        ("prompt contains 'snow'", True),
        ('prompt contains "HILLS"', True),
        ("prompt contains \"'old'\"", True),
        ("prompt contains 'contains'", False),
        ("'snow' in prompt", True),
        ("'fog' not in prompt", True),
        ("not prompt contains 'fog'", True),
        ("prompt contains 'snow' and seed == 7", True),
        (r"prompt contains '\d'", False),
        ("prompt == 'snow'", False),
        ("prompt != 'a # b is c'", True),
        # the sample has no wrap: neither true nor false
        ("wrap < 1", False),
        ("not wrap < 1", False),
        ("wrap < 1 or wrap >= 1", False),
        ("wrap < 1 or seed == 7", True),
        ("not (wrap < 1 and seed == 8)", True),
        ("wrap == clip", False),
        ("wrap != clip", False),
    ],
)
def test_expressions_select_the_sample(expression, expected):
    assert matches(expression) is expected


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1])
def test_large_seeds_are_compared_exactly(seed):
    def count(expression):
        where = parse(expression)
        query = f"SELECT count(*) FROM samples WHERE {where.sql}"
        return load([replace(ENTRY, seed=seed)])[0].execute(query, where.values).fetchone()[0]

    assert count(f"seed == {seed}")
    assert not count(f"seed != {seed}")
    assert not count(f"seed == {seed - 1}")
    assert count(f"{seed - 1} < seed")
    assert count(f"width < seed and seed > -1 and seed >= {seed}")


KEPT = {"rating": "7", "category": "alps", "mean score": 0.5, "code": "007", "seed": 3, "size": None, "ok": True}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("rating > 6.5 and rating == 7", True),
        ("category == 'alps'", True),
        ("category contains 'ALP' and 'lp' in category", True),
        ("category contains 'sea'", False),
        ("`mean score` < 0.6", True),
        ("code == '007'", True),
        ("column_seed == 3 and seed == 7", True),
        ("column_size == 'x' or column_size != 'x'", False),  # the sample has no size
        ("ok == 1", True),
        ("prompt_id == 'a' and sample_index == 1", True),
        ("prompt_id contains 'b'", False),
        ("sample_index < 1", False),
    ],
)
def test_kept_columns_and_identities_select_the_sample(expression, expected):
    entry = replace(ENTRY, columns=KEPT)
    where = parse(expression, KeptColumns.infer([KEPT]))
    database = load([entry], where.kept)[0]
    query = f"SELECT count(*) FROM samples WHERE {where.sql}"
    assert database.execute(query, where.values).fetchone() == (int(expected),)


def test_errors_list_kept_columns_and_know_their_kinds():
    kept = KeptColumns.infer([KEPT])
    for expression, message in (
        ("categori == 'a'", "did you mean 'category'?"),
        ("category > 'a'", "a text has no order"),
        ("rating == 'a'", "this is a text, and a number is needed"),
        ("zzz > 1", "sample_index, category, code"),
    ):
        with pytest.raises(UserError) as error:
            parse(expression, kept)
        assert message in str(error.value)


def test_the_table_can_only_be_read():
    database = load([ENTRY])[0]
    for statement in (
        "DELETE FROM samples",
        "ATTACH 'x.db' AS x",
        "PRAGMA user_version = 1",
        "SELECT load_extension('x')",
    ):
        with pytest.raises(sqlite3.DatabaseError, match="not auth"):
            database.execute(statement).fetchall()


def test_scores_used_by_an_expression_are_listed():
    assert parse("coherence > 0 and (wrap < 2 or seed == 3)").scores == {"coherence", "wrap"}
    assert parse("prompt contains 'seam'").scores == set()


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os')", "character 1: unknown name '__import__'"),
        ("seed.__class__ == 1", "character 5: '.' has no meaning here"),
        ("seed[0] == 1", "character 5: '[' has no meaning here"),
        ("seed = 7", "character 6: '=' has no meaning here"),
        ("seed == 7; DROP TABLE samples", "character 10: ';' has no meaning here"),
        ("seed == 7 -- and seam > 2", "character 11: '-' has no meaning here"),
        ("seed == 7 # and seam > 2", "character 11: '#' has no meaning here"),
        ("seed + 1 == 8", "character 6: '+' has no meaning here"),
        ("load_extension('x') == 1", "character 1: unknown name 'load_extension'"),
        ("seed == (SELECT 1)", "character 9: '(' has no meaning here"),
        ("seed == True", "character 9: unknown name 'True'"),
        ("seed == 1j", "character 9: '1' has no meaning here"),
        ("seed < 1e999", "character 8: numbers must be below 2^64"),
        ("seed < 18446744073709551616", "character 8: numbers must be below 2^64"),
        (f"seed < {'9' * 5000}", "is 5007 characters long; at most 2000"),
        ("x" * (MAX_LENGTH + 1), "characters long"),
        (f"{'(' * 900}seed > 1{')' * 900}", "the expression cannot be parsed"),
        ("coherenc > 1", "character 1: unknown name 'coherenc'; did you mean 'coherence'?"),
        ("seam > 1 and zzz > 1", "character 14: unknown name 'zzz'"),
        ("  zzz > 1", "character 3: unknown name 'zzz'"),
        ("prompt contains 'é' and zzz > 1", "character 25: unknown name 'zzz'"),
        ("coherence", "character 1: this is a number, and a comparison is needed"),
        ("seam > 1 and coherence", "character 14: this is a number, and a comparison is needed"),
        ("'a'", "character 1: this is a text, and a comparison is needed"),
        ("prompt > 'a'", "character 1: a text has no order"),
        ("(seam > 1) > 0", "character 12: '>' has no meaning here"),
        ("seam > 'a'", "character 8: this is a text, and a number is needed"),
        ("seam contains 'a'", 'write prompt contains "text"'),
        ("prompt contains seam", 'write prompt contains "text"'),
        ("'a' contains 'b'", 'write prompt contains "text"'),
        ("prompt in 'b'", 'write prompt contains "text"'),
        ("prompt contains prompt", 'write prompt contains "text"'),
        ("seed is 7", "character 1: this is a number, and a comparison is needed"),
        ("seed == 7) or (seam > 1", "the expression cannot be parsed"),
        ("seed == 7 seam > 1", "the expression cannot be parsed"),
        ("seam >", "a value is missing at the end"),
        ("and", "the expression cannot be parsed"),
        ("prompt contains 'open", "character 17: "),
        ("seed == 7\nseam", "must be one line of text"),
        ("seed\0 == 7", "must be one line of text"),
        ("", "must be one line of text"),
        ("   ", "must be one line of text"),
    ],
)
def test_invalid_expressions_are_refused_in_one_line(expression, message):
    with pytest.raises(UserError) as error:
        parse(expression)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if "character " in message:
        assert "seam, wrap, coherence, clip, seed, height, width, prompt contains" in str(error.value)
