import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from madgen.diffusion.regions import Bootstrap, Composition, Regions, with_background

FULL = torch.ones(1, 4, 6)


def left_half():
    mask = torch.zeros(1, 4, 6)
    mask[..., :3] = 1
    return mask


def test_background_fills_what_the_regions_leave():
    masks = with_background(torch.cat([left_half(), 0.5 * FULL]))
    assert masks.shape == (3, 4, 6)
    assert masks[0, :, :3].max() == 0  # covered one and a half times: never below 0
    assert masks[0, :, 3:].unique().tolist() == [0.5]


def test_rows_are_averaged_under_their_masks_canvas_by_canvas():
    masks = torch.cat([with_background(left_half()), FULL])  # a canvas of two prompts, then one of one
    regions = Regions(masks, [2, 1])
    values = torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1, 1).expand(3, 2, 4, 6)
    composed = regions.compose(values)
    assert composed.shape == (2, 2, 4, 6)
    assert composed[0, :, :, :3].unique().tolist() == [20]
    assert composed[0, :, :, 3:].unique().tolist() == [10]
    assert composed[1].unique().tolist() == [30]


def test_overlapping_regions_share_a_cell_by_weight():
    regions = Regions(torch.cat([0 * FULL, 3 * FULL, FULL]), [3])
    values = torch.tensor([0.0, 4.0, 8.0]).view(3, 1, 1, 1).expand(3, 1, 4, 6)
    assert regions.compose(values).unique().tolist() == [5]


def test_without_bootstrapping_every_row_sees_its_canvas():
    canvases = torch.randn(2, 1, 4, 6)
    rows = Regions(torch.cat([with_background(left_half()), FULL]), [2, 1]).rows(canvases, None, torch.tensor(5), 0)
    assert torch.equal(rows, canvases[[0, 0, 1]])


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_bootstrapping_hides_the_canvas_from_regions_outside_their_masks_for_its_steps(kind):
    scheduler = kind()
    scheduler.set_timesteps(10)
    noise, canvas = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 6)
    colours = torch.randn(3, 2, 2)
    bootstrap = Bootstrap(3, colours, noise.repeat(2, 1, 1, 1), torch.tensor([False, True]))
    regions = Regions(with_background(left_half()), [2], bootstrap)
    for step, timestep in enumerate(scheduler.timesteps[:4]):
        background, region = regions.rows(canvas, scheduler, timestep, step)
        assert torch.equal(background, canvas[0])
        assert torch.equal(region[..., :3], canvas[0, ..., :3])
        if step < 3:
            plain = colours[step, 1].view(1, 2, 1, 1).expand(1, 2, 4, 6)
            expected = scheduler.add_noise(plain, noise, timestep.reshape(1))
            torch.testing.assert_close(region[..., 3:], expected[0, ..., 3:])
        else:
            assert torch.equal(region, canvas[0])


def test_masks_that_leave_cells_without_a_prompt_are_refused():
    with pytest.raises(ValueError, match="without a prompt"):
        Regions(left_half(), [1])
    with pytest.raises(ValueError, match="as many masks"):
        Regions(FULL, [2])


def test_single_prompt_uses_the_whole_canvas():
    canvas = torch.randn(1, 2, 3, 4)
    one = Composition()
    assert one.rows(canvas, None, torch.tensor(0), 0) is canvas
    assert one.compose(canvas) is canvas
