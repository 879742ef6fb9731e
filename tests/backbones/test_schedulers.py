"""Sampling with `layout: whole` equals the diffusers pipeline, for each scheduler that can step a canvas."""

import importlib.util
import re

import pytest
import torch

from madgen import PanoramaSampler, UserError
from madgen.backbones._schedulers import scheduler_class
from madgen.config.schema import SamplingParams

SIZE = {"height": 32, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
EQUAL = """
    CMStochasticIterative DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep
    EDMDPMSolverMultistep EDMEuler EulerAncestralDiscrete EulerDiscrete HeunDiscrete IPNDM KDPM2AncestralDiscrete
    KDPM2Discrete LCM PNDM SASolver TCD UniPCMultistep
""".split()
if importlib.util.find_spec("scipy") is not None:  # without it, it is refused with the package's name
    EQUAL.append("LMSDiscrete")
REFUSED = """
    Amused BlockRefinement CogVideoXDPM DDIMInverse DDPMWuerstchen DPMSolverMultistepInverse FlowMatchEulerDiscrete
    FlowMatchHeunDiscrete FlowMatchLCM KarrasVe RePaint SCM ScoreSdeVe UnCLIP VQDiffusion
""".split()


@pytest.fixture(scope="module")
def pipeline(tiny):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)


@pytest.fixture(scope="module")
def whole(tiny):
    return PanoramaSampler.from_pretrained(str(tiny), layout="whole", mad_steps=0, dtype="float32")


@pytest.mark.parametrize("name", EQUAL)
def test_canvas_steps_equal_the_pipelines(whole, pipeline, name):
    """TCD's own default for the noise that it adds is eta = 0.3; the pipeline would hand it 0."""
    scheduler = scheduler_class(f"{name}Scheduler").from_config(pipeline.scheduler.config)
    other = type(pipeline)(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    options = {"eta": 0.3 if name == "TCD" else 0.0, "output_type": "latent", **SIZE}
    reference = other("a hill", generator=torch.Generator().manual_seed(2), **options).images
    whole.params = SamplingParams(scheduler=f"{name}Scheduler")
    latents = whole.sample(["a hill"], seeds=[2], output="latent", **SIZE)
    assert float((latents - reference).norm() / reference.norm()) <= 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_that_cannot_step_a_canvas_are_refused_by_name(whole, name):
    whole.params = SamplingParams(scheduler=f"{name}Scheduler")
    with pytest.raises(UserError, match=f"sampling.scheduler={name}Scheduler (cannot|does not|needs)"):
        whole.new_scheduler(4)


def test_every_scheduler_of_diffusers_is_used_or_refused_in_one_line(whole):
    import diffusers

    used = []
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")):
        whole.params = SamplingParams(scheduler=name)
        try:
            whole.new_scheduler(4)
            used.append(name.removesuffix("Scheduler"))
        except UserError as error:
            assert name in str(error)
            assert "\n" not in str(error)
    assert set(EQUAL) <= set(used)
    assert not set(REFUSED) & set(used)


def test_schedulers_with_unseeded_noise_are_refused(whole, monkeypatch):
    from madgen.backbones import _schedulers

    scheduler = whole.backbone.new_scheduler(SamplingParams(scheduler="DDIMScheduler", num_inference_steps=4))
    scheduler.noise_sampler = None
    with pytest.raises(UserError, match="draws noise independently of the sample's seed"):
        _schedulers.check_scheduler(scheduler)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DDIM", "did you mean DDIMScheduler?"),
        ("DDIMSchduler", "did you mean DDIMScheduler?"),
        ("EulerDiscreteSheduler", "did you mean EulerDiscreteScheduler?"),
        ("Q", "use for example DDIMScheduler"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, said):
    with pytest.raises(
        UserError, match=rf"sampling\.scheduler='{name}' is not a diffusers scheduler; {re.escape(said)}"
    ):
        scheduler_class(name)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscret", "LMSDiscrete", "Foo", "unipc", "FlowMatchHeunDiscret"])
def test_schedulers_that_are_proposed_fit_a_flow_matching_backbone(madgen_here, job_file, name):
    """The proposal can be planned."""
    words = ["backbone.name=flux", "backbone.pretrained=demo-dit", "sampling.height=128", "sampling.width=256"]
    refused = madgen_here("plan", job_file, *words, f"sampling.scheduler={name}")
    proposed = re.search(r"(?:did you mean|use for example) (\w+)\??$", refused.err.strip())
    assert (refused.code, proposed is not None) == (2, True), refused.err
    assert madgen_here("plan", job_file, *words, f"sampling.scheduler={proposed[1]}").code == 0


@pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="torchsde is installed")
def test_packages_that_a_scheduler_lacks_are_named_and_no_others():
    with pytest.raises(UserError, match=r"DPMSolverSDEScheduler needs packages that are not installed: torchsde$"):
        scheduler_class("DPMSolverSDEScheduler")
