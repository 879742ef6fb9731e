import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from view_axes import axes

from madgen.diffusion.merge import grid_of, merge, merge_cells, split, split_cells
from madgen.diffusion.views import Axis, Views


@settings(max_examples=60, deadline=None)
@given(rows=axes(), columns=axes(), seed=st.integers(0, 99))
def test_merge_undoes_split(rows, columns, seed):
    views = Views(rows, columns)
    canvas = torch.randn(2, 3, rows.extent, columns.extent, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(merge(split(canvas, views), views), canvas)


def test_split_returns_views_in_row_major_order():
    views = Views(Axis(6, 4, (0, 2)), Axis(8, 4, (0, 4)))
    canvas = torch.arange(48.0).view(1, 1, 6, 8)
    cut = split(canvas, views)
    assert cut.shape == (1, 4, 1, 4, 4)
    for index, (top, left) in enumerate([(0, 0), (0, 4), (2, 0), (2, 4)]):
        assert torch.equal(cut[0, index, 0], canvas[0, 0, top : top + 4, left : left + 4])


def test_a_looped_view_wraps_around_the_edge():
    views = Views(Axis(1, 1, (0,)), Axis(6, 4, (0, 2, 4)))
    assert split(torch.arange(6.0).view(1, 1, 1, 6), views)[0, 2, 0, 0].tolist() == [4, 5, 0, 1]


def test_merge_is_the_plain_mean_over_the_views():
    starts, size, extent = (0, 3, 6), 5, 11
    views = Views(Axis(2, 2, (0,)), Axis(extent, size, starts))
    noise = torch.randn(2, 3, 4, 2, size)
    total, count = torch.zeros(2, 4, 2, extent), torch.zeros(extent)
    for index, start in enumerate(starts):
        total[..., start : start + size] += noise[:, index]
        count[start : start + size] += 1
    torch.testing.assert_close(merge(noise, views), total / count)


def test_channels_last_and_first_agree():
    views = Views(Axis(6, 4, (0, 2)), Axis(8, 4, (0, 2, 4)))
    canvas = torch.randn(2, 3, 6, 8)
    grid = grid_of(views, canvas.device)
    cells = split_cells(canvas.permute(0, 2, 3, 1), grid)
    assert torch.equal(cells.permute(0, 1, 4, 2, 3), split(canvas, views))
    assert torch.equal(merge_cells(cells, grid).permute(0, 3, 1, 2), merge(split(canvas, views), views))
