"""What a scheduler's config says is what runs: every key, options of the job, and what cannot run is refused."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from madgen import PanoramaSampler, UserError
from madgen.backbones._schedulers import evaluated_steps, own_scheduler, scheduler_class
from madgen.config.schema import SamplingParams
from madgen.dataset.format import to_json
from madgen.hub.weights import ModelFiles

SIZE = {"height": 32, "width": 64, "guidance_scale": 3.0}
BASE = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
CONFIGS = [
    ("DDIMScheduler", {"steps_offset": 0}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"thresholding": True}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "steps_offset": 0}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "steps_offset": 0}),
    ("PNDMScheduler", {"skip_prk_steps": False, "steps_offset": 0}),
    ("DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "timestep_spacing": "leading", "steps_offset": 0}),
]


@pytest.fixture(scope="module")
def whole(tiny):
    return PanoramaSampler.from_pretrained(str(tiny), layout="whole", mad_steps=0, dtype="float32")


def configured(folder, tmp_path, content):
    """Copy a checkpoint, with another config of its scheduler."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(content), encoding="utf-8")
    index = copy / "model_index.json"
    entry = {"scheduler": ["diffusers", content["_class_name"]]}
    index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | entry), encoding="utf-8")
    return copy


def reference(folder, scheduler, steps=4, pipeline_class="StableDiffusionPipeline"):
    """Sample with diffusers' pipeline and a scheduler that replaces its own after construction, so it is used as is."""
    import diffusers

    pipeline = getattr(diffusers, pipeline_class).from_pretrained(folder)
    pipeline.scheduler = scheduler
    generator = torch.Generator().manual_seed(2)
    options = {"height": 32, "width": 64, "guidance_scale": 3.0, "num_inference_steps": steps}
    return pipeline("a hill", generator=generator, output_type="latent", **options).images


def error_of(sampler, expected, steps=4):
    latents = sampler.sample(["a hill"], seeds=[2], output="latent", num_inference_steps=steps, **SIZE)
    return float((latents - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "keys"), CONFIGS, ids=str)
def test_every_key_of_the_checkpoint_s_scheduler_is_used(name, keys, tiny, tmp_path):
    content = {"_class_name": name, **BASE, **keys}
    folder = configured(tiny, tmp_path, content)
    expected = reference(folder, scheduler_class(name).from_config(content), steps=8)
    without = reference(folder, scheduler_class(name).from_config({"_class_name": name, **BASE}), steps=8)
    assert not torch.equal(expected, without)
    sampler = PanoramaSampler.from_pretrained(str(folder), layout="whole", mad_steps=0, dtype="float32")
    assert error_of(sampler, expected, steps=8) <= 1e-4


def test_keys_that_the_config_lacks_are_those_of_the_pipeline(tiny, tmp_path):
    folder = configured(tiny, tmp_path, {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
    from diffusers import StableDiffusionPipeline

    own = StableDiffusionPipeline.from_pretrained(folder).scheduler
    assert (own.config.steps_offset, own.config.clip_sample) == (1, False)
    sampler = PanoramaSampler.from_pretrained(str(folder), layout="whole", mad_steps=0, dtype="float32")
    assert error_of(sampler, reference(folder, own)) <= 1e-4


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (None, {"timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    ],
)
def test_scheduler_options_are_the_arguments_of_the_class(scheduler, options, whole, tiny):
    cls = scheduler_class(scheduler or "DDIMScheduler")
    whole.params = SamplingParams(scheduler=scheduler, scheduler_options=options)
    config = own_scheduler(ModelFiles(str(tiny)))
    expected = reference(tiny, cls.from_config(config, **options))
    assert error_of(whole, expected) <= 1e-4
    assert not torch.equal(expected, reference(tiny, cls.from_config(config)))


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (None, {"use_karras_sigmas": True}, "use_karras_sigmas: DDIMScheduler has no such argument; it has num_train"),
        (None, {"timestep_spacng": "trailing"}, "timestep_spacng: .* did you mean timestep_spacing?"),
        (None, {"timestep_spacing": "odd"}, "timestep_spacing of DDIMScheduler must be one of .*linspace"),
        (None, {"steps_offset": 1.5}, "steps_offset of DDIMScheduler must be an integer, got 1.5"),
        (None, {"clip_sample": 1}, "clip_sample of DDIMScheduler must be true or false, got 1"),
        (None, {"beta_start": "low"}, "beta_start of DDIMScheduler must be a finite number, got 'low'"),
        (None, {"prediction_type": "v_prediction"}, "prediction_type=v_prediction: set backbone.prediction_type"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "odd"}, "EulerDiscreteScheduler.*odd"),
        (
            "EulerDiscreteScheduler",
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            "with sampling.scheduler_options=.* does not fit this checkpoint: Only one of",
        ),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "configured for flow matching"),
    ],
)
def test_options_that_do_not_fit_are_refused(scheduler, options, message, whole, tiny):
    whole.params = SamplingParams(scheduler=scheduler, scheduler_options=options)
    with pytest.raises(UserError, match=message):
        whole.new_scheduler(4)
    with pytest.raises(UserError, match=message):
        evaluated_steps(own_scheduler(ModelFiles(str(tiny))), replace(whole.params, num_inference_steps=4), flow=False)


def test_options_are_recorded_only_where_they_are_set():
    assert "scheduler_options" not in SamplingParams().to_metadata()
    params = SamplingParams(scheduler_options={"timestep_spacing": "trailing"})
    assert SamplingParams.from_metadata(json.loads(to_json(params.to_metadata()))) == params


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete"])
@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
def test_plans_accept_exactly_the_numbers_of_steps_that_run(name, steps, tiny):
    config = own_scheduler(ModelFiles(str(tiny))) | {"_class_name": f"{name}Scheduler", "timestep_spacing": "leading"}
    scheduler = scheduler_class(f"{name}Scheduler").from_config(config)
    try:
        evaluated_steps(config, SamplingParams(num_inference_steps=steps), flow=False)
        accepted = True
    except UserError as error:
        accepted = False
        assert f"num_inference_steps={steps}" in str(error)
    assert accepted == runs(scheduler, steps)


def runs(scheduler, steps):
    """Return whether every step from noise stays within the trained timesteps and gives finite latents."""
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    try:
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(0.1 * latents, timestep, latents).prev_sample
    except (IndexError, ValueError):
        return False
    return bool(latents.isfinite().all()) and float(scheduler.timesteps.max()) <= 999


def test_the_largest_possible_number_of_steps_is_named(madgen_here, job_file):
    result = madgen_here("plan", job_file, "sampling.num_inference_steps=1000")
    assert result.code == 2
    assert "num_inference_steps=1000 is not possible with DDIMScheduler" in result.err
    assert "reach from 1000 to 1, but those of training from 999 to 0" in result.err
    assert "the largest possible number is 999" in result.err
    trailing = "sampling.scheduler_options={timestep_spacing: trailing}"
    assert madgen_here("plan", job_file, "sampling.num_inference_steps=1000", trailing).code == 0
    above = madgen_here("plan", job_file, "sampling.num_inference_steps=1001", trailing)
    assert "num_inference_steps=1001 is more than the 1000 of training" in above.err


@pytest.mark.parametrize(
    ("content", "scheduler", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None, "configured for flow matching"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "DDIMScheduler", "configured for flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, None, "configured for flow matching"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, None, "flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "DDIMScheduler", "flow matching"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "IPNDMScheduler", "prediction_type=v_pr"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "noise"}, None, "DDIMScheduler.*prediction_type"),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "PNDMScheduler",
            "does not support rescale_betas_zero_snr=True",
        ),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            None,
            "latents are not finite after timestep 999",
        ),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "steep"}, None, "does not fit .*steep"),
        ({"_class_name": "DDIMScheduler", "steps_offset": "one"}, None, "DDIMScheduler"),
    ],
    ids=str,
)
def test_configs_that_cannot_sample_are_refused_by_plan(
    content, scheduler, message, tiny, tmp_path, madgen_here, job_file
):
    folder = configured(tiny, tmp_path, {**BASE, **content})
    chosen = [f"backbone.pretrained={folder}", *([f"sampling.scheduler={scheduler}"] if scheduler else [])]
    result = madgen_here("plan", job_file, *chosen)
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1
    assert re.search(message, result.err)
    with pytest.raises(UserError, match=message):
        PanoramaSampler.from_pretrained(str(folder), scheduler=scheduler).new_scheduler(4)


@pytest.mark.slow
def test_options_are_part_of_the_dataset_s_identity_and_of_samples(madgen, job_file, tmp_path):
    options = "sampling.scheduler_options={timestep_spacing: trailing}"
    done = madgen("generate", job_file, options, "prompts.limit=1")
    assert done.code == 0, done.err
    identity = json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))["identity"]
    assert identity["sampling"]["scheduler_options"] == {"timestep_spacing": "trailing"}
    other = madgen("generate", job_file, "prompts.limit=1")
    assert (other.code, "scheduler_options" in other.err) == (2, True)
    key = json.loads(next((tmp_path / "out/shards").glob("*.json")).read_text(encoding="utf-8"))["samples"][0]["key"]
    assert "the same pixels" in madgen("regenerate", "out", key, "-o", "again.png").out
