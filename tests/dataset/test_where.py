import pytest

from madgen.dataset.filtering.expression import DEEPEST, LONGEST, parse
from madgen.utils.errors import UserError

ROW = {"key": "a-0001", "prompt": "Snow on 'old' hills", "seed": 7, "height": 32, "width": 64,
       "coherence": 0.9, "seam": 1.1}  # fmt: skip


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
def test_what_it_means(expression, expected):
    assert parse(expression)(ROW) is expected


def test_it_knows_which_scores_it_needs():
    assert parse("coherence > 0 and (wrap < 2 or seed == 3)").scores == {"coherence", "wrap"}
    assert parse("prompt contains 'seam'").scores == set()


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os')", "character 1: this has no meaning here"),
        ("__import__('os').system('true') == 0", "character 1: "),
        ("seed.__class__ == 1", "character 1: this has no meaning"),
        ("seed[0] == 1", "character 1: "),
        ("(lambda: 1)() == 1", "character 1: "),
        ("[seed for seed in prompt] == 1", "character 1: "),
        ("f'{seed}' == prompt", "character 1: "),
        ("(seed := 3) == 3", "character 2: "),
        ("seed ** 99999999 > 1", "character 1: "),
        ("seed + 1 == 8", "character 1: "),
        ("1 if seed else 2", "character 1: "),
        ("seed > 1, seed", "character 1: "),
        ("seed == True", "character 9: only numbers and texts in quotes are values here"),
        ("seed == None", "character 9: only numbers"),
        ("seed == -True", "character 10: only numbers"),
        ("seed == 1j", "character 9: only numbers"),
        ("prompt == b'a'", "character 11: only numbers"),
        ("seed == ...", "character 9: only numbers"),
        ("seed < 1e999", "character 8: numbers end at 2^63 here"),
        (f"seed < {'9' * 1000}", "character 8: numbers end at 2^63 here"),
        ("seed < 9223372036854775809", "character 8: numbers end at 2^63"),
        (f"seed < {'9' * 5000}", "is 5007 characters long; at most 2000"),
        (f"{'(' * 900}seed > 1{')' * 900}", "this cannot be read"),
        (f"{'not ' * (DEEPEST + 1)}seed > 1", "more than 40 levels deep"),
        ("not " * 480 + "seed > 1", "more than 40 levels deep"),
        ("-" * 1900 + "1 < seed", "--where, character 1: "),
        ("x" * (LONGEST + 1), "characters long"),
        ("coherenc > 1", "character 1: unknown name 'coherenc'; did you mean 'coherence'?"),
        ("seam > 1 and zzz > 1", "character 14: unknown name 'zzz'"),
        ("  zzz > 1", "character 3: unknown name 'zzz'"),
        ("prompt contains 'é' and zzz > 1", "character 25: unknown name 'zzz'"),
        ("coherence", "character 1: this is a number, and a comparison is needed"),
        ("seam > 1 and coherence", "character 14: this is a number, and a comparison is needed"),
        ("'a'", "character 1: this is a text, and a comparison is needed"),
        ("prompt > 'a'", "character 1: a text has no order"),
        ("(seam > 1) > 0", "character 2: a comparison has no order"),
        ("seam > 'a'", "character 8: this is a text, and a number is needed"),
        ("seam contains 'a'", "character 1: this is a number, and a text is needed"),
        ("prompt contains seam", "character 17: this is a number, and a text is needed"),
        ("'a' contains 'b'", "character 1: write prompt contains"),
        ("prompt in 'b'", "write prompt contains"),
        ("prompt contains prompt", "character 1: write prompt contains"),
        ("seed is 7", "character 6: 'is' has no meaning here; write == or contains"),
        ("seed == 7 # and seam > 2", "character 11: this cannot be read"),
        ("seed = 7", "this cannot be read"),
        ("seed == 7) or (seam > 1", "this cannot be read"),
        ("seam >", "this cannot be read"),
        ("prompt contains 'open", "this cannot be read"),
        ("seed == 7; seam", "this cannot be read"),
        ("seed == 7\nseam", "must be one line of text"),
        ("seed\0 == 7", "must be one line of text"),
        ("", "must be one line of text"),
        ("   ", "must be one line of text"),
    ],
)
def test_everything_else_is_refused_in_one_line(expression, message, recwarn):
    with pytest.raises(UserError) as error:
        parse(expression)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if "character " in message:
        assert "seam, wrap, coherence, clip, seed, height, width, prompt contains" in str(error.value)
    assert not recwarn.list
