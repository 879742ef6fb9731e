import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from madgen.errors import UserError
from madgen.joint.views import Axis, Views, build_layout, loop_starts, view_starts

small = st.integers(1, 24)


@given(size=small, stride=small, steps=st.integers(0, 12))
def test_views_cover_every_cell_and_nothing_else(size, stride, steps):
    assume(stride <= size)
    extent = size + steps * stride
    covered = {cell for start in view_starts(extent, size, stride) for cell in range(start, start + size)}
    assert covered == set(range(extent))


@given(size=small, stride=small, extent=st.integers(1, 120))
def test_a_size_is_covered_or_refused(size, stride, extent):
    try:
        starts = view_starts(extent, size, stride)
    except UserError as error:
        assert str(extent) in str(error)
    else:
        assert starts[-1] + size == extent


def test_the_refusal_names_the_nearest_sizes():
    with pytest.raises(UserError, match=r"nearest sizes are 376 and 400"):
        view_starts(384, 64, 24)
    assert view_starts(376, 64, 24)
    assert view_starts(400, 64, 24)


@given(size=small, stride=small, turns=st.integers(1, 12))
def test_a_loop_covers_every_cell_equally_when_the_stride_divides_the_view(size, stride, turns):
    assume(size % stride == 0 and turns * stride >= size)
    axis = Axis(turns * stride, size, tuple(loop_starts(turns * stride, size, stride)))
    assert {len(found) for found in axis.covers} == {size // stride}


def test_an_axis_with_a_gap_is_refused():
    with pytest.raises(ValueError, match="uncovered"):
        Axis(10, 4, (0, 6)).covers  # noqa: B018


def test_scaled_views_are_the_same_views_on_a_coarser_grid():
    views = build_layout("overlapping", 16, 96, 16, 4).at(0)
    assert views.scaled(4) == build_layout("overlapping", 4, 24, 4, 1).at(0)
    assert not Views(Axis(16, 16, (0,)), Axis(22, 16, (0, 6))).divisible(4)


def test_the_paper_takes_21_views_for_512x3072():
    assert build_layout("overlapping", 64, 384, 64, 16).at(0).count == 21


def test_a_grid_covers_both_directions():
    assert build_layout("overlapping", 96, 128, 64, 32).at(0).count == 2 * 3


def test_whole_is_one_view():
    assert build_layout("whole", 7, 9, 64, 16).at(3).count == 1


def test_an_unknown_layout_is_refused():
    with pytest.raises(UserError, match="layout must be one of"):
        build_layout("diagonal", 64, 64, 64, 16)
