"""Sizes and counts as text."""

import pytest

from madgen.utils.console import plural, rate_text, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (2_400_000, "2.4 MB"),
        (999_500, "1.0 MB"),
        (123_400_000_000, "123 GB"),
        (1_179_648_000_000, "1.2 TB"),
        (10**19, "10000 PB"),
    ],
)
def test_sizes_have_the_unit_that_fits(size, text):
    assert size_text(size) == text


def test_one_is_singular():
    assert [plural(count, "shard") for count in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (8, "8.00 panoramas/s"),
        (0.996, "1.00 panoramas/s"),
        (0.15, "9.00 panoramas/min"),
        (0.003, "10.8 panoramas/h"),
        (0, "0.0 panoramas/h"),
    ],
)
def test_rates_have_a_unit_of_which_there_is_at_least_one(per_second, text):
    assert rate_text(per_second) == text
