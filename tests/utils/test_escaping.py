from madgen.utils.escaping import escaped


def test_escaped_text_is_plain():
    assert escaped("a *b*\n\x1b c") == r"a \*b\* c"
    assert escaped("<b> | [x](y)") == r"\<b\> \| \[x\]\(y\)"
    assert escaped("see www.example.com") == r"see www\.example.com"
    assert len(escaped("x" * 1000)) == 200
