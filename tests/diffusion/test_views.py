import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from madgen.diffusion.views import Axis, Views, build_layout, shifted_starts, shifts, view_starts
from madgen.utils.errors import UserError

small = st.integers(1, 24)


@given(size=small, stride=small, steps=st.integers(0, 12))
def test_views_cover_every_cell_and_nothing_else(size, stride, steps):
    assume(stride <= size)
    extent = size + steps * stride
    covered = {cell for start in view_starts(extent, size, stride) for cell in range(start, start + size)}
    assert covered == set(range(extent))


@given(size=small, stride=small, extent=st.integers(1, 120))
def test_size_is_covered_or_refused(size, stride, extent):
    try:
        starts = view_starts(extent, size, stride)
    except UserError as error:
        assert str(extent) in str(error)
    else:
        assert starts[-1] + size == extent


def test_error_names_the_nearest_sizes():
    with pytest.raises(UserError, match=r"nearest sizes are 376 and 400"):
        view_starts(384, 64, 24)
    assert view_starts(376, 64, 24)
    assert view_starts(400, 64, 24)


@given(stride=st.integers(1, 8), overlap=st.integers(1, 4), more=st.integers(0, 8))
def test_a_loop_covers_every_cell_equally_when_the_stride_divides_the_view(stride, overlap, more):
    size, turns = stride * overlap, overlap + more
    axis = Axis(turns * stride, size, tuple(view_starts(turns * stride, size, stride, loop=True)))
    assert {len(found) for found in axis.covers} == {size // stride}


def test_an_axis_with_a_gap_is_refused():
    with pytest.raises(ValueError, match="uncovered"):
        Axis(10, 4, (0, 6)).covers  # noqa: B018


def test_scaled_views_are_the_same_views_on_a_coarser_grid():
    views = build_layout("overlapping", 16, 96, 16, 4).at(0)
    assert views.scaled(4) == build_layout("overlapping", 4, 24, 4, 1).at(0)
    assert not Views(Axis(16, 16, (0,)), Axis(22, 16, (0, 6))).divisible(4)


def test_paper_geometry_has_21_views_for_512x3072():
    assert build_layout("overlapping", 64, 384, 64, 16).at(0).count == 21


def test_a_grid_covers_both_directions():
    assert build_layout("overlapping", 96, 128, 64, 32).at(0).count == 2 * 3


@given(size=st.integers(2, 16), extra=st.integers(0, 40), shift=st.integers(0, 15), loop=st.booleans())
def test_shifted_views_cover_every_cell(size, extra, shift, loop):
    assume(shift < size)
    starts = shifted_starts(size + extra, size, shift, loop)
    axis = Axis(size + extra, size, tuple(starts))
    assert all(axis.covers)
    assert len(starts) <= -(-(size + extra) // size) + 1


def test_shifts_visit_every_offset_and_jump():
    assert shifts(16, 4) == [0, 8, 4, 12]
    layout = build_layout("shifted", 16, 96, 16, 4, merged_steps=6)
    assert layout.at(0).columns.starts == (0, 16, 32, 48, 64, 80)
    assert layout.at(1).columns.starts == (0, 8, 24, 40, 56, 72, 80)
    assert layout.at(5) == layout.at(1)
    assert {layout.at(step).rows.starts for step in range(4)} == {(0,)}


def test_shifts_are_single_cells_after_the_merged_steps():
    layout = build_layout("shifted", 16, 96, 16, 4, merged_steps=6)
    seen = {start for step in range(6) for start in layout.at(step).columns.starts}
    for step in range(6, 10):
        borders = set(layout.at(step).columns.starts) - {0, 80}  # the ends stay inside the canvas
        assert borders
        assert not borders & seen
        seen |= borders
    everywhere = {start % 16 for step in range(16) for start in layout.at(6 + step).columns.starts[1:-1]}
    assert everywhere == set(range(16))


def test_whole_is_one_view():
    assert build_layout("whole", 7, 9, 64, 16).at(3).count == 1


def test_an_unknown_layout_is_refused():
    with pytest.raises(UserError, match="layout must be one of"):
        build_layout("diagonal", 64, 64, 64, 16)
