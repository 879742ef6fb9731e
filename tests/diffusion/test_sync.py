"""SyncDiffusion: its schedule, its gradient against finite differences, and a decreasing loss."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

from madgen import Box, PanoramaSampler, Region, UserError
from madgen.config.schema import SyncConfig
from madgen.diffusion.syncdiffusion import SyncGuidance, predict_x0
from madgen.diffusion.views import Axis, Views
from madgen.models.perceptual import lpips, lpips_network
from madgen.sampling.joint_sampler import ConditionedDenoiser

THREE = Views(Axis(8, 8, (0,)), Axis(16, 8, (0, 4, 8)))
SIZE = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "output": "latent"}


def test_weight_decays_to_zero():
    sync = SyncConfig(weight=20.0, decay=0.5, steps=4)
    assert [sync.at(step) for step in range(5)] == [20, 10, 5, 2.5, 0]
    assert [SyncConfig(weight=8.0, decay=0.5, steps=4, every=2).at(step) for step in range(5)] == [0, 4, 0, 1, 0]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, LCMScheduler])
def test_predicting_x0_does_not_advance_the_scheduler(kind):
    scheduler = kind()
    scheduler.set_timesteps(4)
    latents, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    timestep = scheduler.timesteps[0]
    first = predict_x0(scheduler, noise, timestep, latents)
    assert torch.equal(first, predict_x0(scheduler, noise, timestep, latents))
    assert getattr(scheduler, "step_index", None) is None


def test_predicted_x0_of_ddim_equals_its_formula():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    latents, noise = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    timestep = scheduler.timesteps[1]
    alpha = scheduler.alphas_cumprod[timestep]
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    torch.testing.assert_close(predict_x0(scheduler, noise, timestep, latents), clean)


@pytest.fixture(scope="module")
def guidance(tiny):
    """SyncDiffusion on the tiny pipeline, LPIPS over an untrained VGG16, at the first of 3 steps."""
    sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=0)
    conditioning = sampler.backbone.encode_prompts(["a hill", "the sea"], ["", "fog"], 3.0)
    denoiser = ConditionedDenoiser(sampler.backbone, sampler.method.merging, conditioning)
    distance = lpips("random", torch.device("cpu"))
    sync = SyncConfig(weight=100.0, decay=1.0, steps=3)
    guidance = SyncGuidance(sync.at, denoiser.predict_separately, sampler.backbone.decode, distance)
    scheduler = sampler.new_scheduler(3)
    views = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return guidance, scheduler, views


def test_the_gradient_agrees_with_finite_differences(guidance):
    guidance, scheduler, views = guidance
    timestep = scheduler.timesteps[0]
    view, anchor = views[:, 0], guidance._predict_image(views[:, 1], scheduler, timestep)
    gradient = guidance.gradient(view, anchor, scheduler, timestep)

    def loss(moved):
        return guidance.distance(guidance._predict_image(moved, scheduler, timestep), anchor).sum().double()

    for direction in (
        gradient,
        torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)) * gradient.std() + gradient,
    ):
        step = 0.003 * direction / direction.norm() * view[0].numel() ** 0.5
        difference = (loss(view + step) - loss(view - step)) / 2
        assert float((gradient * step).sum()) == pytest.approx(float(difference), rel=0.03)


def test_loss_decreases_and_the_anchor_view_is_unchanged(guidance):
    guidance, scheduler, views = guidance
    timestep = scheduler.timesteps[0]

    def losses(views):
        anchor = guidance._predict_image(views[:, 1], scheduler, timestep)
        return [
            guidance.distance(guidance._predict_image(views[:, i], scheduler, timestep), anchor).sum() for i in (0, 2)
        ]

    before = losses(views)
    pulled = views
    for _ in range(3):
        pulled = guidance.pull(pulled, THREE, scheduler, timestep, 0)
    assert torch.equal(pulled[:, 1], views[:, 1])
    assert all(after < 0.99 * old for after, old in zip(losses(pulled), before, strict=True))


def test_gradient_does_not_depend_on_other_prompts_in_the_batch(guidance):
    guidance, scheduler, views = guidance
    together = guidance.pull(views, THREE, scheduler, scheduler.timesteps[0], 0)
    neighbour = torch.stack([views[0], views[1].flip(-1)])
    swapped = guidance.pull(neighbour, THREE, scheduler, scheduler.timesteps[0], 0)
    torch.testing.assert_close(together[0], swapped[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_weight_zero_disables_sync_and_sync_composes_with_mad(tiny):
    def sample(**method):
        sampler = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", sync_network="random", **method)
        return sampler.sample(["a hill"], seeds=[1], **SIZE)

    plain, mad = sample(mad_steps=0), sample(mad_steps=2)
    assert torch.equal(sample(mad_steps=0, sync_weight=0.0), plain)
    both = sample(mad_steps=2, sync_weight=20.0)
    for other in (plain, mad, sample(mad_steps=0, sync_weight=20.0)):
        assert not torch.allclose(both, other, atol=1e-3)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_scheduler_without_predicted_x0_is_refused(tiny, name):
    sampler = PanoramaSampler.from_pretrained(str(tiny), sync_weight=20.0, sync_network="random", scheduler=name)
    with pytest.raises(UserError, match=rf"method\.sync: {name}"):
        sampler.new_scheduler(3)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        pytest.param("EulerDiscreteScheduler", marks=pytest.mark.slow),
        pytest.param("EulerAncestralDiscreteScheduler", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("where", [{"loop": True}, {"height": 48}, {"width": 64}])
def test_runs_on_grids_loops_and_regions_with_soft_masks(tiny, name, where):
    sampler = PanoramaSampler.from_pretrained(
        str(tiny), dtype="float32", mad_steps=0, sync_weight=20.0, sync_network="random", sync_steps=1, scheduler=name
    )
    region = Region(Box(3, 5, 17, 30), "the sea")
    latents = sampler.sample(["a hill"], seeds=[1], regions=[[region]], **{**SIZE, **where})
    assert latents.isfinite().all()


def test_zero_gradient_changes_nothing_under_soft_masks(tiny, monkeypatch):
    monkeypatch.setattr(SyncGuidance, "gradient", lambda self, view, *arguments: torch.zeros_like(view))
    region, latents = Region(Box(3, 5, 17, 30), "the sea"), []
    for weight in (0.0, 20.0):
        sampler = PanoramaSampler.from_pretrained(
            str(tiny), dtype="float32", mad_steps=1, sync_weight=weight, sync_network="random"
        )
        latents.append(sampler.sample(["a hill"], seeds=[1], regions=[[region]], **SIZE))
    torch.testing.assert_close(*latents)


def test_the_anchor_is_the_middle_view_of_the_middle_row():
    grid = Views(Axis(12, 8, (0, 4)), Axis(24, 8, (0, 4, 8, 12, 16)))
    assert grid.middle == 5 + 2
    assert Views(Axis(8, 8, (0,)), Axis(20, 8, (0, 4, 8, 12))).middle == 2


@pytest.mark.slow
def test_works_inside_inference_mode(tiny):
    sampler = PanoramaSampler.from_pretrained(str(tiny), sync_weight=20.0, sync_network="random")
    plain = sampler.sample(["a hill"], seeds=[1], **SIZE)
    with torch.inference_mode():
        assert torch.equal(sampler.sample(["a hill"], seeds=[1], **SIZE), plain)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"sync_every": 0}, "every must be >= 1"),
        ({"sync_network": "alex"}, "must be one of vgg, random"),
        ({"layout": "whole"}, "layout=whole has only one"),
    ],
)
def test_settings_without_effect_are_refused(tiny, method, message):
    with pytest.raises(UserError, match=message):
        PanoramaSampler.from_pretrained(str(tiny), sync_weight=20.0, **method)


@pytest.fixture
def no_networks():
    """Forget loaded networks before and after a test."""
    lpips_network.cache_clear()
    yield
    lpips_network.cache_clear()


@pytest.mark.usefixtures("no_networks")
def test_missing_weights_error_names_file_and_fix(monkeypatch, tmp_path):
    from urllib.error import URLError

    import torch.hub

    def refuse(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"method\.sync\.network=random"):
        lpips("vgg", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_networks")
def test_trained_weights_are_read_from_the_download_cache(monkeypatch, tmp_path):
    """The file that torchvision would download, here with known values."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = torchvision.models.vgg16(weights=None)
    name = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints" / name)
    pictures = torch.rand(2, 1, 3, 32, 32)
    distance = lpips("vgg", torch.device("cpu"))(*pictures)
    assert distance.shape == (1,)
    assert float(distance) != float(lpips("random", torch.device("cpu"))(*pictures))
