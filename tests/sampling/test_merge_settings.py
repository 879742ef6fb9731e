"""Settings of merge operators and aligned noise: combinations, refusals, cost, fingerprint and reproduction."""

import json
import tarfile
from functools import lru_cache

import pytest
import torch
from diffusers import DDIMScheduler
from parameters import combinations

from madgen import Box, PanoramaSampler, Region, load_job
from madgen.config.schema import (
    BackboneConfig,
    MadConfig,
    MergeConfig,
    MethodConfig,
    NoiseConfig,
    SamplingParams,
    SyncConfig,
    ViewsConfig,
)
from madgen.dataset import manifest
from madgen.dataset.plan import build_plan
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun
from madgen.sampling.inputs import parse_batch
from madgen.sampling.method import Method
from madgen.utils.errors import UserError

SWAP, RADIAL = MergeConfig(operator="swap"), MergeConfig(weights="radial")
REFERENCE = MergeConfig(operator="swap", reference_steps=2)
REGION = Region(Box(8, 0, 40, 20), "the sea")


@lru_cache(maxsize=1)
def backbone_of(folder):
    """Load the backbone that all samplers of this module share."""
    config = BackboneConfig(pretrained=str(folder), dtype="float32")
    return PanoramaSampler.from_configs(config, MethodConfig(mad=MadConfig(steps=0))).backbone


def sampler_of(tiny, merge=MergeConfig(), align=0.0, scheduler=None, mad=0, sync=0.0, **views):  # noqa: B008
    method = MethodConfig(
        views=ViewsConfig(**views),
        mad=MadConfig(steps=mad),
        merge=merge,
        noise=NoiseConfig(align=align),
        sync=SyncConfig(weight=sync, network="random"),
    )
    backbone = backbone_of(tiny)
    return PanoramaSampler(backbone, Method(method), SamplingParams(scheduler=scheduler))


def sample(sampler, **options):
    size = {"height": 32, "width": 80, "num_inference_steps": 4, "guidance_scale": 2.0, "output": "latent"}
    return sampler.sample(["a hill"], seeds=[1], **{**size, **options})


def assert_close(one, other):
    assert float((one - other).norm() / other.norm()) <= 1e-4


CHANGES = [
    {"mad": 2},
    {"layout": "shifted"},
    {"layout": "shifted", "mad": 2, "overlap_from": 3},
    {"align": 0.5, "scheduler": "UniPCMultistepScheduler"},
    {"scheduler": "HeunDiscreteScheduler"},
]
SIZES = [{}, {"loop": True, "width": 96}, {"regions": [[REGION]]}, {"height": 48}]


@pytest.mark.parametrize(("change", "options", "merge"), combinations(CHANGES, SIZES, [SWAP, RADIAL], one_in=4))
def test_operators_combine_with_other_methods(tiny, merge, change, options):
    size = {"width": 80, **options}
    ours, mean = (sample(sampler_of(tiny, each, **change), **size) for each in (merge, MergeConfig()))
    assert ours.isfinite().all()
    assert ours.shape == mean.shape
    overlaps = change.get("layout") != "shifted" or "overlap_from" in change or "loop" not in options
    assert torch.equal(ours, mean) != overlaps


@pytest.mark.slow
def test_operators_combine_with_syncdiffusion(tiny):
    swapped, mean = (
        sample(sampler_of(tiny, merge, sync=20.0), num_inference_steps=2) for merge in (SWAP, MergeConfig())
    )
    assert swapped.isfinite().all()
    assert not torch.equal(swapped, mean)


@pytest.mark.parametrize("options", [{}, {"loop": True, "width": 96}, {"height": 56}], ids=str)
def test_reference_combines_with_loops_and_grids(tiny, options):
    sampler = sampler_of(tiny, REFERENCE, stride=6)
    latents = sample(sampler, **options)
    assert latents.shape == (1, 4, options.get("height", 32) // 4, options.get("width", 80) // 4)
    assert latents.isfinite().all()
    assert not torch.equal(latents, sample(sampler_of(tiny, SWAP, stride=6), **options))
    images = sampler.sample(["a hill"], seeds=[1], height=32, width=80, num_inference_steps=2)
    assert images.shape == (1, 32, 80, 3), "the annex is not decoded"


def test_callbacks_see_the_canvas_without_the_annex(tiny):
    seen = []

    def on_step(step, timestep, latents):
        seen.append(latents.shape)
        return 0 * latents if step == 3 else latents

    sampler = sampler_of(tiny, REFERENCE, stride=6)
    batch = parse_batch(32, 80, ["a hill"], None, [1], None)
    latents = sampler.sample_latents(batch, SamplingParams(num_inference_steps=4), on_step=on_step)
    assert seen == [(1, 4, 8, 20)] * 4
    assert torch.equal(latents, torch.zeros(1, 4, 8, 20))


def test_reference_does_not_depend_on_the_batch(tiny):
    sampler = sampler_of(tiny, REFERENCE, stride=6, align=0.3)
    size = {"height": 32, "width": 80, "num_inference_steps": 4, "output": "latent"}
    both = sampler.sample(["a hill", "the sea"], seeds=[1, 2], **size)
    for index, prompt in enumerate(["a hill", "the sea"]):
        assert_close(both[index], sampler.sample([prompt], seeds=[index + 1], **size)[0])


@pytest.mark.parametrize("merge", [SWAP, RADIAL, REFERENCE], ids=["swap", "radial", "reference"])
def test_chunks_of_views_change_only_the_last_bits(tiny, merge):
    sampler = sampler_of(tiny, merge, stride=6)
    assert_close(sample(sampler, chunk_views=1), sample(sampler))


def test_first_steps_are_those_of_mad(tiny):
    """Predictions are averaged while attention is merged, so the latents after two steps are MAD's."""
    after = {}
    for name, merge in (("mean", MergeConfig()), ("swap", SWAP)):
        sampler = sampler_of(tiny, merge, mad=2)
        step = sampler.new_scheduler(4).step.__func__
        steps = after[name] = []

        def recorded(self, *arguments, step=step, steps=steps, **options):
            result = step(self, *arguments, **options)
            steps.append(result.prev_sample)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(sampler.backbone.scheduler), "step", recorded)
            sample(sampler)
    equal = [torch.equal(*pair) for pair in zip(after["mean"], after["swap"], strict=True)]
    assert equal == [True, True, False, False]


@pytest.mark.parametrize("scheduler", [None, "EulerAncestralDiscreteScheduler"])
def test_settings_at_their_defaults_change_nothing(tiny, scheduler):
    plain = PanoramaSampler.from_pretrained(str(tiny), mad_steps=0, scheduler=scheduler, dtype="float32")
    assert torch.equal(sample(sampler_of(tiny, scheduler=scheduler)), sample(plain))


def test_views_without_overlap_are_sampled_as_plain_tiles(tiny):
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    tiles = []
    for tile in noise.split(8, dim=-1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("madgen.sampling.noise.initial_noise", lambda *arguments, tile=tile: tile)
            tiles.append(sample(sampler_of(tiny, SWAP), width=32))
    together = sample(sampler_of(tiny, SWAP, stride=8), width=64)
    assert_close(together, torch.cat(tiles, dim=-1))


REFUSED = [
    (["method.merge.operator=mix"], "method.merge.operator must be one of average, swap, got 'mix'"),
    (["method.merge.weights=linear"], "method.merge.weights must be one of uniform, radial, gaussian, got 'linear'"),
    (["method.merge.width=0"], "method.merge.width must be > 0 latent cells, got 0"),
    (["method.merge.width=2"], "method.merge.width=2 has no effect with operator=average"),
    (["method.merge.reference_steps=1"], "method.merge.reference_steps=1 needs operator=swap"),
    (["method.merge.reference_steps=-1"], "method.merge.reference_steps must be >= 0, got -1"),
    (
        ["method.merge={operator: swap, weights: radial}"],
        "method.merge.weights=radial has no effect with operator=swap",
    ),
    (["method.noise.align=1.5"], "method.noise.align must be in 0..1, got 1.5"),
    (["method.noise.align=.nan"], "method.noise.align must be in 0..1, got nan"),
    (["method.noise.align=-0.1"], "method.noise.align must be in 0..1, got -0.1"),
    (["method.merge.weights=radial", "method.views.layout=whole"], "has no effect with layout=whole"),
    (
        ["method.merge.operator=swap", "method.mad.steps=2"],
        "method.merge.operator=swap has no effect: attention is merged in all of sampling.num_inference_steps=2 steps",
    ),
    (["method.merge={operator: swap, reference_steps: 1}"], "in which method.mad merges attention"),
    (
        ["method.merge={operator: swap, reference_steps: 1}", "method.mad={steps: 0, cross_attention: always}"],
        "in which method.mad merges attention",
    ),
    (
        ["method.merge={operator: swap, reference_steps: 1}", "method.mad.steps=0", "method.views.layout=shifted"],
        "method.merge.reference_steps=1 needs views that stay in place, got method.views.layout=shifted",
    ),
    (
        ["method.merge={operator: swap, reference_steps: 3}", "method.mad.steps=0"],
        "method.merge.reference_steps must be <= sampling.num_inference_steps=2, got 3",
    ),
    (
        ["method.merge={operator: swap, reference_steps: 1}", "method.mad.steps=0", "sampling.loop=true"],
        "method.merge.reference_steps has no effect on 32x64 px: views of 8 latent cells with method.views.stride=2",
    ),
    (
        [
            "method.merge={operator: swap, reference_steps: 1}",
            "method.mad.steps=0",
            "prompts.regions=[{mask: [0, 0, 8, 8], prompt: a hut}]",
        ],
        "method.merge.reference_steps=1 would put rows of the panorama's prompt into its regions",
    ),
    (
        [
            "method.merge={operator: swap, reference_steps: 1}",
            "method.mad.steps=0",
            "sampling.scheduler=UniPCMultistepScheduler",
        ],
        "but UniPCMultistepScheduler uses the predictions of earlier steps; use for example sampling.scheduler=DDIM",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: str(value)[-60:])
def test_impossible_combinations_are_refused_by_name(refused, job_file, overrides, message):
    assert message in refused("generate", job_file, *overrides)


def test_sampler_refuses_what_only_a_call_reveals(tiny, monkeypatch):
    with pytest.raises(UserError, match="weights=radial has no effect: attention is merged in all of"):
        sample(sampler_of(tiny, RADIAL, mad=4))
    with pytest.raises(UserError, match="reference_steps must be <= sampling"):
        sample(sampler_of(tiny, REFERENCE, stride=6), num_inference_steps=1)
    with pytest.raises(UserError, match="rows of the panorama's prompt into its regions"):
        sample(sampler_of(tiny, REFERENCE, stride=6), regions=[[REGION]])
    sampler = sampler_of(tiny, SWAP)
    monkeypatch.setattr(
        sampler.backbone, "scheduler", DDIMScheduler.from_pretrained(tiny / "scheduler", thresholding=True)
    )
    with pytest.raises(UserError, match="DDIMScheduler with thresholding=true clips by a quantile"):
        sample(sampler)


def test_plan_counts_the_reference_and_nothing_else(job_file, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    options = ["method.mad.steps=0", "method.views.stride=6", "sampling.width=80", "sampling.num_inference_steps=4"]

    def planned(*overrides):
        return forecast(ResolvedRun.of(load_job(job_file, [*options, *overrides]))).cost.view_evaluations

    def evaluated(merge, align=0.0):
        sampler, counts = sampler_of(tiny, merge, align, stride=6), []
        with sampler.backbone.unet.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0]))):
            sample(sampler)
        return 10 * sum(counts)

    swap, reference = "method.merge.operator=swap", "method.merge.reference_steps=2"
    assert planned() == planned(swap) == evaluated(SWAP) == evaluated(RADIAL) == 10 * 3 * 4 * 2
    assert planned(swap, reference) == evaluated(REFERENCE) == 10 * (3 * 4 + 2) * 2
    assert planned("method.noise.align=0.5") == evaluated(MergeConfig(), 0.5) == planned()


def test_fingerprint_has_the_settings_only_where_they_differ(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def built(*overrides):
        job = load_job(job_file, overrides)
        return manifest.build(job, build_plan(job), "float32")

    plain = built()
    assert set(plain.identity["method"]) == {"views", "mad", "sync", "regions"}
    assert built("method.merge={operator: average, width: 1}", "method.noise.align=0").fingerprint == plain.fingerprint
    others = [built(f"method.{each}") for each in ("merge.operator=swap", "merge.weights=radial", "noise.align=0.1")]
    assert len({each.fingerprint for each in (plain, *others)}) == 4
    assert "merge" in others[0].identity["method"]
    assert "noise" not in others[0].identity["method"]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_and_samples_are_reproduced(madgen, job_file, tmp_path):
    method = ["method.mad.steps=0", "method.views.stride=6", "sampling.width=80", "method.noise.align=0.2"]
    method += ["method.merge={operator: swap, reference_steps: 1}", "output.samples_per_shard=1"]
    for devices in (1, 2):
        run = ("generate", job_file, *method, f"trainer.devices={devices}", f"output.dir=out{devices}")
        result = madgen(*run)
        assert result.code == 0, result.err
    one, two = (sorted((tmp_path / f"out{devices}/shards").glob("*.tar")) for devices in (1, 2))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    with tarfile.open(one[0]) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".json"))
        recorded = json.load(tar.extractfile(name))["method"]
    assert recorded["merge"] == {"operator": "swap", "weights": "uniform", "width": 1, "reference_steps": 1}
    assert recorded["noise"] == {"align": 0.2}
    again = madgen("regenerate", "out1", name.removesuffix(".json"), "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    other = madgen("generate", job_file, *method[:-1], "output.dir=out1", "method.noise.align=0.3")
    assert other.code == 2
    assert "method.noise.align: 0.2 there, 0.3 here" in other.err
