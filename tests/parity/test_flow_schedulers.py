"""Schedulers on flow-matching checkpoints: with `layout: whole` they step as in diffusers' pipelines."""

from pathlib import Path

import diffusers
import flow_reference
import numpy as np
import pytest
import torch

from madgen import PanoramaSampler, UserError
from madgen.backbones._flow import FlowSchedule, adapted, flow_scheduler, linear_mu
from madgen.backbones._schedulers import evaluated_steps, new_scheduler, scheduler_class
from madgen.config.schema import SamplingParams

GOLDEN = Path(__file__).parent / "golden" / "dit"
FOLDERS = {"flux": GOLDEN / "tiny-flux-dev", "sd3": GOLDEN / "tiny-sd3"}
SOLVERS = ["UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module", params=list(FOLDERS))
def family(request):
    name = request.param
    pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDERS[name])
    made = PanoramaSampler.from_pretrained(str(FOLDERS[name]), name=name, layout="whole", mad_steps=0, dtype="float32")
    made.backbone.max_sequence_length = 16
    return name, pipe, made


def ours(made, name, steps=4):
    made.params = SamplingParams(scheduler=f"{name}Scheduler")
    run = {"height": 32, "width": 32, "num_inference_steps": steps, "guidance_scale": 3.5}
    return made.sample(["mountains"], seeds=[3], output="latent", **run)


def error(latents, reference):
    return float((latents - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_step_flow_sigmas_with_the_shift_of_the_checkpoint(family, name):
    """FLUX.1 [dev] shifts dynamically, by mu of the picture's tokens; Stable Diffusion 3 by a shift of 3."""
    kind, pipe, made = family
    config = pipe.scheduler.config
    shift = {} if config.use_dynamic_shifting else {"flow_shift": config.shift}
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, **FLOW, **shift)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    latents = other(
        "mountains", height=32, width=32, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=16,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    if kind == "flux":
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    assert error(ours(made, name), latents) <= 1e-5


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"])
def test_flow_matching_schedulers_step_as_in_a_plain_loop(family, name):
    """LCM draws its noise from the generator of the sample. Heun has a static shift alone: exp(mu) of a dynamic one."""
    _, pipe, made = family
    config, steps = pipe.scheduler.config, 4
    dynamic = {"shift": float(np.exp(linear_mu(64, steps, config)))} if config.use_dynamic_shifting else {}
    heun = "Heun" in name
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config, **(dynamic if heun else {}))
    if heun:
        scheduler.set_timesteps(steps)
    else:
        flow_reference.guided_scheduler(pipe, steps, 64, scheduler)
    expected = flow_reference.sample(
        pipe, "mountains", 3, 16, 16, steps=steps, guidance_scale=3.5, length=16, prepared=scheduler
    )
    assert error(ours(made, name), expected) <= 1e-5
    own = dict(config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    params = SamplingParams(scheduler=f"{name}Scheduler", num_inference_steps=steps)
    assert len(evaluated_steps(own, params, flow=True)) == len(scheduler.timesteps)


def test_every_scheduler_of_diffusers_steps_a_flow_or_is_refused_in_one_line(family):
    _, _, made = family
    used = set()
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")):
        made.params = SamplingParams(scheduler=name)
        try:
            scheduler = made.new_scheduler(4)
        except UserError as refusal:
            assert name in str(refusal)
            assert "\n" not in str(refusal)
            continue
        used.add(name.removesuffix("Scheduler"))
        assert "FlowMatch" in name or (scheduler.config.use_flow_sigmas and scheduler.config.flow_shift > 1)
    assert used == {*SOLVERS, "SASolver", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"}


def test_a_part_of_the_schedule_is_never_ignored():
    """Qwen-Image's checkpoints end at a sigma of their own, which Heun and DPM++ do not know; UniPC does."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    for name in ("FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"):
        with pytest.raises(UserError, match=rf"{name} does not support the checkpoint's shift_terminal=0.02"):
            new_scheduler(own, SamplingParams(scheduler=name), "cpu", schedule=FlowSchedule())
    unipc = new_scheduler(own, SamplingParams(scheduler="UniPCMultistepScheduler"), "cpu", schedule=FlowSchedule())
    assert unipc.config.shift_terminal == 0.02


def test_steps_predict_the_clean_image_and_noise_is_added_as_in_training():
    scheduler, _ = flow_scheduler(
        scheduler_class("FlowMatchEulerDiscreteScheduler"), {"shift": 3.0}, 4, 64, FlowSchedule()
    )
    scheduler.set_timesteps(4)
    image, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    time = scheduler.timesteps[1]
    noisy = scheduler.add_noise(image, noise, time.expand(2))
    diffusers_own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    diffusers_own.set_timesteps(4)
    assert torch.allclose(noisy, diffusers_own.scale_noise(image, time.expand(2), noise), atol=1e-6)
    step = scheduler.step(noise - image, time, noisy)
    assert torch.allclose(step.pred_original_sample, image, atol=1e-5)
    assert torch.equal(step.prev_sample, scheduler_step(diffusers_own, noise - image, time, noisy))
    assert adapted(type(scheduler)) is type(scheduler)


def scheduler_step(scheduler, *arguments):
    return scheduler.step(*arguments).prev_sample


def test_mu_is_that_of_diffusers():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert linear_mu(4096, 28, {}) == pytest.approx(calculate_shift(4096))
    config = {"base_image_seq_len": 100, "max_image_seq_len": 900, "base_shift": 0.4, "max_shift": 0.9}
    assert linear_mu(300, 28, config) == pytest.approx(calculate_shift(300, 100, 900, 0.4, 0.9))
