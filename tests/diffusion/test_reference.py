"""The reference-guided swap: its rows, its steps, and the schedulers that support it."""

import copy

import diffusers
import pytest
import torch
from wave_denoiser import DDIM, Wave, of, wave

from madgen.diffusion.denoise import joint_diffusion
from madgen.diffusion.merge import split
from madgen.diffusion.operators import MergeOperator
from madgen.diffusion.reference import ReferenceSwap, check_history, with_annex
from madgen.diffusion.views import Layout, build_layout

CPU = torch.device("cpu")


HISTORY = {
    "DDIMScheduler": False,
    "DDPMScheduler": False,
    "EulerDiscreteScheduler": False,
    "EulerAncestralDiscreteScheduler": False,
    "LCMScheduler": False,
    "TCDScheduler": False,
    "DPMSolverMultistepScheduler": True,
    "DPMSolverSinglestepScheduler": True,
    "UniPCMultistepScheduler": True,
    "DEISMultistepScheduler": True,
    "PNDMScheduler": True,
    "LMSDiscreteScheduler": True,
    "HeunDiscreteScheduler": True,
    "KDPM2DiscreteScheduler": True,
    "SASolverScheduler": True,
}


@pytest.mark.parametrize(("name", "refused"), HISTORY.items())
def test_schedulers_that_use_earlier_predictions_take_no_reference(name, refused):
    scheduler = of(name)
    before = copy.deepcopy(vars(scheduler))
    if refused:
        with pytest.raises(ValueError, match=name):
            check_history(scheduler)
    else:
        check_history(scheduler)
    assert str(vars(scheduler)) == str(before), "the scheduler is not changed"


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_multistep_schedulers_are_refused_with_two_steps_too(name):
    """Their last step is of first order, and would not show it."""
    with pytest.raises(ValueError, match=name):
        check_history(of(name, 2))


def test_a_multistep_scheduler_of_first_order_takes_a_reference():
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(DDIM | {"solver_order": 1})
    scheduler.set_timesteps(5)
    check_history(scheduler)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("height", [8, 14])
def test_reference_gives_every_other_row_of_the_middle(height, loop):
    """Against views stepped one by one, each a tensor; on grids too."""
    size, stride, width, steps, until = 8, 6, 24 if loop else 20, 4, 2
    views = build_layout("overlapping", height, width, size, stride, loop).at(0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, height, width, generator=generator, dtype=torch.float64)
    reference = torch.randn(1, 4, size, size, generator=generator, dtype=torch.float64)
    canvas = joint_diffusion(
        with_annex(noise, reference), of("DDIMScheduler", steps), Layout(lambda step: views), Wave(), [],
        merger=ReferenceSwap("swap", reference_steps=until),
    )[..., :width]  # fmt: skip

    scheduler, latents = of("DDIMScheduler", steps), noise
    for step, time in enumerate(scheduler.timesteps):
        predicted = MergeOperator("swap").merge(wave(split(latents, views), views, step, time), views, step)
        latents = scheduler.step(predicted, time, latents).prev_sample
        if step < until:
            reference = scheduler.step(wave(reference[:, None], views, step, time)[:, 0], time, reference).prev_sample
            for row in range(height):
                for column in range(width):
                    on = [
                        ((row - top), (column - left) % width)
                        for top in views.rows.starts
                        for left in views.columns.starts
                        if 0 <= row - top < size and (column - left) % width < size
                    ]
                    if len(on) == 1 and on[0][0] % 2 == 1:
                        latents[..., row, column] = reference[..., on[0][0], on[0][1]]
    assert torch.equal(canvas, latents)


def test_reference_is_denoised_in_its_steps_only():
    views, counts = build_layout("overlapping", 8, 20, 8, 6).at(0), []

    class Counting:
        def predict(self, views_BVChw, views, step, timestep):
            counts.append(views_BVChw.shape[1])
            return wave(views_BVChw, views, step, timestep)

    noise = with_annex(torch.randn(1, 4, 8, 20), torch.randn(1, 4, 8, 8))
    merger = ReferenceSwap("swap", reference_steps=2)
    joint_diffusion(noise, of("DDIMScheduler", 4), Layout(lambda step: views), Counting(), [], merger=merger)
    assert counts == [4, 4, 3, 3]
