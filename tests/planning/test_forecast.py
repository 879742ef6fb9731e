"""The cost of a plan against the evaluations that sampling takes."""

import json
import socket
import threading
import time

import pytest
import torch

from madgen import Box, PanoramaSampler, Region, load_job
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun
from madgen.types import Ramp
from madgen.utils.errors import UserError

SETTINGS = ["sampling.height=32", "sampling.width=64", "method.mad.steps=1", "prompts.source=p.txt"]


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a hill\n", encoding="utf-8")

    def of(*overrides, assume=False):
        job = load_job([], [*SETTINGS, *overrides])
        return forecast(ResolvedRun.of(job), assume_spec=assume)

    return of


def with_scheduler(tiny, folder, name):
    """The tiny checkpoint with another scheduler of its own."""
    folder.mkdir()
    for part in tiny.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    config = json.loads((tiny / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**config, "_class_name": name}), encoding="utf-8"
    )
    index = json.loads((tiny / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}), encoding="utf-8")
    return folder


def evaluated(folder, scheduler=None, steps=6, bootstrapping=None, **options):
    """Count the views that the UNet is run on for one panorama."""
    sampler = PanoramaSampler.from_pretrained(
        str(folder), mad_steps=1, scheduler=scheduler, dtype="float32", region_bootstrapping=bootstrapping
    )
    seen = []
    sampler.backbone.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    size = {"height": 32, "width": 64, "num_inference_steps": steps, "guidance_scale": 7.5}
    with torch.no_grad():
        sampler.sample(["a hill"], seeds=[0], output="latent", **size, **options)
    return sum(seen)


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "PNDM", "UniPCMultistep"]
)
@pytest.mark.parametrize("own", [True, False])
def test_cost_equals_the_evaluations_of_sampling(planned, tiny, tmp_path, name, own):
    folder = with_scheduler(tiny, tmp_path / "backbone", f"{name}Scheduler") if own else tiny
    scheduler = None if own else f"{name}Scheduler"
    options = [f"backbone.pretrained={folder}", "sampling.num_inference_steps=6"]
    cost = planned(*options, *([] if own else [f"sampling.scheduler={scheduler}"])).cost
    assert cost.view_evaluations == evaluated(folder, scheduler)


def test_direct_inference_counts_as_the_views_that_cover_the_canvas(planned, tiny):
    """Its one pass over the canvas has as many latent cells as they, rounded up."""
    sampler = PanoramaSampler.from_pretrained(str(tiny), layout="whole", dtype="float32")
    cells = []
    sampler.backbone.unet.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[0][:, 0].numel()))
    for width in (32, 64, 72):
        cells.clear()
        with torch.no_grad():
            size = {"height": 32, "width": width, "num_inference_steps": 3, "guidance_scale": 7.5}
            sampler.sample(["a hill"], seeds=[0], output="latent", **size)
        words = ["sampling.num_inference_steps=3", f"sampling.width={width}", "method.views.layout=whole"]
        plan = planned(f"backbone.pretrained={tiny}", *words, "method.mad.steps=0")
        views = -(-width // 32)
        assert plan.cost.view_evaluations == 3 * 2 * views
        assert 0 <= plan.cost.view_evaluations - sum(cells) / sampler.backbone.spec.view_size**2 < 3 * 2
        assert set(plan.shapes.views.values()) == {1}


def test_direct_inference_costs_as_much_as_mad_in_all_layers_and_steps(planned):
    """In a transformer both are one pass over the canvas."""
    words = ["backbone.name=flux", "backbone.pretrained=demo-dit", "sampling.height=128", "sampling.width=768"]
    words += ["sampling.guidance_scale=3", "sampling.num_inference_steps=4"]
    direct = planned(*words, "method.views.layout=whole", "method.mad.steps=0")
    merged = planned(*words, "method.mad.steps=4")
    assert direct.cost.view_evaluations == merged.cost.view_evaluations == 4 * 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.num_inference_steps=1001", "num_inference_steps=1001 is more than the 1000 of training"),
        ("sampling.scheduler=FlowMatchEulerDiscreteScheduler", "configured for flow matching"),
        ("sampling.original_inference_steps=50", "is not supported by DDIMScheduler"),
    ],
)
def test_settings_the_scheduler_cannot_take_are_an_error(planned, tiny, override, message):
    with pytest.raises(UserError, match=message):
        planned(f"backbone.pretrained={tiny}", override)


def test_planning_does_not_wait_for_an_unreachable_hub(planned, monkeypatch):
    """Without a network the hub library retries for long; a plan uses the shapes of the model family at once."""
    from madgen.hub import repository

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sleep = time.sleep  # of other threads goes on
    main = threading.main_thread()
    waits = lambda seconds: pytest.fail(f"waits for {seconds} s")  # noqa: E731
    monkeypatch.setattr("time.sleep", lambda s: waits(s) if threading.current_thread() is main else sleep(s))
    repository._reachable.cache_clear()
    size = ["sampling.height=512", "sampling.width=1024"]
    assert planned("backbone.pretrained=nobody/nothing-of-the-kind", *size, assume=True).shapes.is_assumed
    with pytest.raises(pytest.fail.Exception, match="waits"):
        planned("backbone.pretrained=nobody/nothing-of-the-kind", *size)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_cost_of_guidance_in_some_steps(planned, tiny, name):
    options = [f"backbone.pretrained={tiny}", "sampling.num_inference_steps=6", f"sampling.scheduler={name}"]
    cost = planned(*options, "sampling.guidance_steps=[1,3]").cost
    assert cost.view_evaluations == evaluated(tiny, name, guidance_steps=(1, 3))
    assert cost.view_evaluations < planned(*options).cost.view_evaluations


REGIONS = [Region(Box(0, 0, 32, 32), "a hut"), Region(Box(24, 0, 64, 24), "a tree", "fog")]
BLEND = [Region(Ramp(1, 2), "dunes"), Region(Ramp(2, 2), "the sea")]


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("guidance_steps", [None, (1, 5)])
@pytest.mark.parametrize("bootstrapping", [None, 0])
def test_cost_of_regions(planned, tiny, tmp_path, name, guidance_steps, bootstrapping):
    """Shared negative prompts are evaluated once, after the steps in which regions are bootstrapped."""
    parts = [
        {"mask": [0, 0, 32, 32], "prompt": "a hut"},
        {"mask": [24, 0, 64, 24], "prompt": "a tree", "negative_prompt": "fog"},
    ]
    lines = [{"prompt": "a hill", "regions": parts}, {"prompt": "a hill", "across": ["dunes", "the sea"]}]
    tmp_path.joinpath("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = [f"backbone.pretrained={tiny}", "sampling.num_inference_steps=6", f"sampling.scheduler={name}"]
    options += [f"prompts.source={tmp_path / 'p.jsonl'}", "prompts.on_duplicate=rename"]
    if guidance_steps:
        options.append(f"sampling.guidance_steps=[{guidance_steps[0]},{guidance_steps[1]}]")
    if bootstrapping is not None:
        options.append(f"method.regions.bootstrapping={bootstrapping}")
    plan = planned(*options)
    how = {"guidance_steps": guidance_steps, "bootstrapping": bootstrapping}
    taken = [evaluated(tiny, name, regions=[regions], **how) for regions in (REGIONS, BLEND)]
    assert plan.cost.view_evaluations == sum(taken)
