"""Arrow arrays built without pandas equal those of `pyarrow.array`."""

import pyarrow as pa
import pytest

from madgen.utils.arrow import booleans, integer_array, integers, string_array, validity

COLUMNS = [[], ["a"], ["", None, "é🏔️", None, "x" * 300, *"abcdefgh"], [None] * 9]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("values", COLUMNS)
def test_strings_equal_those_of_pyarrow(values, kind):
    array = string_array(values, kind)
    array.validate(full=True)
    assert array.equals(pa.array(values, kind))
    assert array.null_count == values.count(None)


@pytest.mark.parametrize("values", [[], [0, -1, 2**62]])
def test_integers_equal_those_of_pyarrow(values):
    assert integer_array(values).equals(pa.array(values, pa.int64()))


@pytest.mark.parametrize("values", COLUMNS)
def test_nulls_are_found_in_slices(values):
    for array in (pa.array(values, pa.string()), string_array(values, pa.string())):
        assert validity(array).tolist() == [value is not None for value in values]
        assert validity(array[1:]).tolist() == [value is not None for value in values[1:]]
    assert not validity(pa.nulls(3, pa.string())).any()


def test_integers_of_a_slice():
    assert integers(pa.array([5, 6, 7])[1:]).tolist() == [6, 7]


def test_booleans_equal_those_of_pyarrow():
    values = [True, False, False, True, True, False, True, True, False, True]
    assert booleans(pa.array(values)).tolist() == values
    assert booleans(pa.array(values)[3:]).tolist() == values[3:]
