"""Validation of arguments of the Python API."""

import copy
import re
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from madgen import Box, MaskFile, PanoramaModule, PanoramaSampler, PromptDataModule, Region, ShardWriter, load_job
from madgen.sampling.inputs import check_device, parse_batch
from madgen.utils.errors import UserError
from madgen.utils.validation import listed, number, path, switch, texts, whole

SIZE = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0, "output": "latent"}


@pytest.fixture(scope="module")
def sampler(tiny):
    return PanoramaSampler.from_pretrained(str(tiny), mad_steps=1)


@pytest.mark.parametrize("value", [2.0, "2", None, [2], True, torch.tensor(True), np.array([1, 2])])
def test_integers_of_any_library_are_accepted_and_other_values_refused(value):
    assert [whole("n", each) for each in (2, np.int64(2), torch.tensor(2), 10**30)] == [2, 2, 2, 10**30]
    with pytest.raises(UserError, match=re.escape(f"n must be a whole number, got {value!r}")):
        whole("n", value)
    with pytest.raises(UserError, match="n must be a whole number >= 1, got 0"):
        whole("n", 0, 1)


@pytest.mark.parametrize(
    "value", ["2", np.str_("2"), None, [2], np.True_, 1j, np.complex64(2), float("inf"), float("nan"), 10**400]
)
def test_numbers_of_any_library_are_accepted_and_other_values_refused(value):
    assert [number("x", each) for each in (2, np.float32(0.5), torch.tensor(2.0), Fraction(1, 4))] == [2, 0.5, 2, 0.25]
    with pytest.raises(UserError, match=re.escape(f"x must be a finite number, got {value!r}")):
        number("x", value)
    with pytest.raises(UserError, match=r"x must be a finite number >= 0, got -1.0"):
        number("x", -1.0, 0)


@pytest.mark.parametrize("value", ["abc", b"abc", {"a": 1}, {"a"}, None, 5, np.array(5)])
def test_sequences_are_accepted_and_other_values_refused(value):
    assert [listed("l", each) for each in ((1, 2), [1, 2], np.array([1, 2]), iter([1, 2]))] == [[1, 2]] * 4
    with pytest.raises(UserError, match=re.escape(f"l must be a list, such as [...], got {value!r}")):
        listed("l", value)


def test_texts_paths_and_switches_are_validated():
    assert texts("t", np.array(["a", "b"])) == ["a", "b"]
    assert path("p", Path("a/b")) == "a/b"
    assert [switch("s", each) for each in (False, True, np.bool_(True))] == [False, True, True]
    for check, value, said in (
        (texts, ["a", None], "each of t must be a string, got None"),
        (texts, [b"a"], "each of t must be a string, got b'a'"),
        (path, 5, "t must be a path, got 5"),
        (switch, "false", "t must be True or False, got 'false'"),
        (switch, 0, "t must be True or False, got 0"),
        (switch, np.array([True, False]), "t must be True or False, got array([ True, False])"),
        (texts, ["\ud800"], "each of t must be a string of valid Unicode, got '\\ud800'"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check("t", value)


REGION = Region(Box(0, 0, 20, 32), "a lake")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("dunes", None, [1], None), "prompts must be a list, such as [...], got 'dunes'"),
        ((["a"], "b", [1], None), "negative_prompts must be a list, such as [...], got 'b'"),
        ((["a"], None, 7, None), "seeds must be a list, such as [...], got 7"),
        ((["a"], None, ["7"], None), "a seed must be a whole number, got '7'"),
        ((["a"], None, [True], None), "a seed must be a whole number, got True"),
        ((["a"], None, [-1], None), "a seed must be a whole number of 0..2^64 - 1, got -1"),
        ((["a"], None, [2**64], None), "a seed must be a whole number of 0..2^64 - 1, got 18446744073709551616"),
        ((["a", "b"], None, [1], None), "prompts, negative_prompts and seeds must be non-empty lists of one length"),
        (([], None, [], None), "prompts, negative_prompts and seeds must be non-empty lists of one length"),
        ((["a"], None, [1], []), "regions must have a list for each of 1 prompt, got 0"),
        ((["a"], None, [1], [REGION]), "each of regions must be a list, such as [...], got Region("),
        ((["a"], None, [1], [[{"mask": [0, 0, 1, 1]}]]), "regions must be a list of madgen.Region for each prompt"),
        ((["a"], None, [1], [[Region(REGION.mask, None)]]), "a region's text must be a string, got None"),
        ((["a"], None, [1], [[Region(REGION.mask, "a", 3)]]), "a region's negative must be a string, got 3"),
        (
            (["a"], None, [1], [[Region((0, 0, 8, 8), "a")]]),
            "a region's mask must be a madgen.Box or",
        ),
        ((["a"], None, [1], [[Region(MaskFile(None), "a")]]), "a region's mask must be a madgen.Box or a"),
        ((["a"], None, [1], [[Region(Box(0.5, 0, 1, 1), "a")]]), "a box's left must be a whole number, got 0.5"),
    ],
)
def test_invalid_batches_are_refused(given, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_batch(32, 64, *given)


def test_numpy_and_torch_types_equal_python_types(sampler):
    plain = sampler.sample(["a hill", "the sea"], seeds=[1, 2], regions=[[REGION], []], **SIZE)
    for seeds in (np.array([1, 2]), torch.tensor([1, 2]), (np.int64(1), torch.tensor(2)), iter([1, 2])):
        options = {**SIZE, "height": np.int64(32), "guidance_scale": np.float32(3), "regions": ((REGION,), ())}
        made = sampler.sample(np.array(["a hill", "the sea"]), seeds=seeds, **options)
        assert torch.equal(made, plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"height": "32"}, "height must be a whole number, got '32'"),
        ({"width": None}, "height and width are needed, in pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number >= 1, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number >= 1, got 2.5"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number >= 0, got '7'"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number >= 0, got -1.0"),
        ({"guidance_steps": 5}, "guidance_steps must be a list, such as [...], got 5"),
        ({"chunk_views": 0}, "chunk_views must be a whole number >= 1, got 0"),
        ({"loop": "false"}, "loop must be True or False, got 'false'"),
        ({"decode": "half"}, "sampling.decode must be one of auto, whole, tiled, got 'half'"),
        ({"output": "tensor"}, "output must be one of 'image', 'pil', 'np', 'pt', 'latent', got 'tensor'"),
        ({"on_step": None}, "on_step must be a function of the step, got None"),
    ],
)
def test_unknown_settings_are_refused(sampler, options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sampler.sample(["a"], **{**SIZE, "seeds": [1], **options})


@pytest.mark.parametrize("steps", [(0.5, 2), (2, 2), (0, 6), (-1, 2), (1,), ("0", "2")])
def test_guidance_steps_must_be_two_integers_in_order(sampler, steps):
    run = {**SIZE, "seeds": [1], "num_inference_steps": 5}
    with pytest.raises(UserError, match="guidance_steps must be"):
        sampler.sample(["a"], guidance_steps=steps, **run)


@pytest.mark.parametrize("latents", [np.zeros((1, 4, 8, 16)), torch.zeros(4, 8, 16), torch.zeros(1, 3, 8, 16), None])
def test_only_latents_are_decoded(sampler, latents):
    assert sampler.decode(torch.zeros(1, 4, 8, 16)).shape == (1, 32, 64, 3)
    with pytest.raises(UserError, match=r"latents must be a tensor \[B, 4, height/f, width/f\], got"):
        sampler.decode(latents)


def test_unavailable_device_is_refused_before_loading():
    assert check_device("cpu") == torch.device("cpu")
    for device in ("gpu", None):
        with pytest.raises(UserError, match=f"unknown device {device!r}; use for example 'cpu' or 'cuda'"):
            PanoramaSampler.from_pretrained("demo", device=device)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda': PyTorch finds no GPU on this machine; use 'cpu'"):
            PanoramaSampler.from_pretrained("demo", device="cuda")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "x"}, "method.views.layout must be one of overlapping, shifted, whole, got 'x'"),
        ({"stride": 0}, "method.views.stride must be > 0 latent cells, got 0"),
        ({"stride": "16"}, "stride must be a whole number, got '16'"),
        ({"view_size": 1.5}, "view_size must be a whole number, got 1.5"),
        ({"overlap_from": True}, "overlap_from must be a whole number, got True"),
        ({"mad_steps": -1}, "method.mad.steps must be >= 0, got -1"),
        ({"mad_steps": None}, "mad_steps must be a whole number, got None"),
        ({"mad_blocks": "down"}, "mad_blocks must be a list, such as [...], got 'down'"),
        ({"mad_blocks": [3]}, "each of mad_blocks must be a string, got 3"),
        ({"sync_weight": "20"}, "sync_weight must be a finite number, got '20'"),
        ({"sync_decay": None}, "sync_decay must be a finite number, got None"),
        ({"sync_steps": 1.5}, "sync_steps must be a whole number, got 1.5"),
        ({"sync_every": "1"}, "sync_every must be a whole number, got '1'"),
        ({"sync_weight": 20.0, "sync_steps": 0}, "method.sync.steps=0 leaves method.sync.weight=20 without effect"),
        ({"sync_weight": 20.0, "layout": "whole"}, "method.sync compares views, but layout=whole has only one"),
        ({"region_bootstrapping": -1}, "method.regions.bootstrapping must be >= 0 steps or null, got -1"),
        ({"region_bootstrapping": True}, "region_bootstrapping must be a whole number, got True"),
        ({"original_inference_steps": "50"}, "original_inference_steps must be a whole number, got '50'"),
        ({"scheduler": 5}, "scheduler must be a diffusers scheduler or its class, got 5"),
        ({"dtype": torch.float32}, "backbone.dtype must be one of auto, float32, bfloat16, float16, got torch.float32"),
        ({"compile": "false"}, "compile must be True or False, got 'false'"),
        ({"loras": "style.safetensors"}, "loras must be a list, such as [...], got 'style.safetensors'"),
        ({"loras": [{"weights": None}]}, "a LoRA's weights must be a path, got None"),
        ({"loras": [{"weights": "a", "scale": "abc"}]}, "a LoRA's scale must be a finite number, got 'abc'"),
        ({"pretrained": 5}, "pretrained must be a path, got 5"),
        ({"variant": 5}, "variant must be a string, got 5"),
    ],
)
def test_values_that_jobs_refuse_are_refused_before_loading(options, said, monkeypatch):
    from madgen.backbones.sd import StableDiffusion

    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=re.escape(said)):
        PanoramaSampler.from_pretrained(**{"pretrained": "demo", **options})


def test_step_counts_beyond_the_schedule_mean_all_steps(tiny, sampler):
    throughout = PanoramaSampler.from_pretrained(Path(tiny), mad_steps=10**30, region_bootstrapping=10**30)
    twice = PanoramaSampler.from_pretrained(str(tiny), mad_steps=2, region_bootstrapping=2)
    options = {"seeds": [1], "regions": [[REGION]], **SIZE}
    assert torch.equal(throughout.sample(["a"], **options), twice.sample(["a"], **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pytorch_default_dtype_changes_nothing(tiny, sampler, dtype):
    options = {"seeds": [1], "regions": [[REGION]], **SIZE, "width": 96}
    expected = sampler.sample(["a hill"], **options)
    pixels = sampler.decode(expected, decode="tiled")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        from madgen.diffusion.merge import grid_of

        grid_of.cache_clear()
        assert torch.equal(sampler.sample(["a hill"], **options), expected)
        assert np.array_equal(sampler.decode(expected, decode="tiled"), pixels)
    finally:
        torch.set_default_dtype(before)
        grid_of.cache_clear()


def test_values_that_are_not_jobs_are_refused():
    for make in (PanoramaModule, PromptDataModule, ShardWriter, PanoramaSampler.from_job):
        with pytest.raises(UserError, match=r"job must be a madgen.Job, see madgen.load_job\(path\), got"):
            make("jobs/demo.yaml")
    with pytest.raises(UserError, match="overrides must be a list, such as"):
        load_job([], "sampling.width=1024")
    with pytest.raises(UserError, match="a job file must be a path, got 5"):
        load_job([5])


def test_a_sampler_can_be_copied_and_called_from_its_own_steps(sampler):
    expected = sampler.sample(["a hill"], seeds=[1], **SIZE)
    copied = copy.deepcopy(sampler)
    again = [lambda step: copied.decode(copied.sample(["the sea"], seeds=[2], **SIZE))]
    made = copied.sample(["a hill"], seeds=[1], on_step=lambda step: again.pop()(step) if again else None, **SIZE)
    assert torch.equal(made, expected)


def test_a_sampler_works_for_one_thread_at_a_time(sampler, monkeypatch):
    """Two at once gave pictures that were neither's."""
    said = []

    def meanwhile(step):
        def sample():
            with pytest.raises(UserError) as refused:
                sampler.sample(["the sea"], seeds=[2], **SIZE)
            said.append(str(refused.value))

        thread = threading.Thread(target=sample)
        thread.start()
        thread.join()

    alone = sampler.sample(["a hill"], seeds=[1], **SIZE)
    assert torch.equal(sampler.sample(["a hill"], seeds=[1], on_step=meanwhile, **SIZE), alone)
    refused = "this sampler is in use in another thread; create one sampler for each thread"
    assert said == [refused] * 2
    decode = sampler.backbone.decode
    monkeypatch.setattr(sampler.backbone, "decode", lambda *given: meanwhile(0) or decode(*given))
    sampler.decode(alone)
    sampler.sample(["a hill"], seeds=[1], **{**SIZE, "output": "image"})
    assert said == [refused] * 4
    with pytest.raises(ZeroDivisionError):
        sampler.sample(["a hill"], seeds=[1], on_step=lambda step: 1 / 0, **SIZE)
    assert torch.equal(sampler.sample(["a hill"], seeds=[1], **SIZE), alone)


@pytest.mark.slow
def test_threads_may_load_and_sample_side_by_side(tiny):
    """In float32; a model in half precision changes PyTorch's default dtype while it is loaded."""
    made = {}

    def work(seed):
        own = PanoramaSampler.from_pretrained(str(tiny), mad_steps=1)
        made[seed] = own.sample(["a hill"], seeds=[seed], **SIZE)

    alone = PanoramaSampler.from_pretrained(str(tiny), mad_steps=1)
    expected = {seed: alone.sample(["a hill"], seeds=[seed], **SIZE) for seed in range(4)}
    for _ in range(3):
        made.clear()
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[seed], latents) for seed, latents in expected.items())


@pytest.mark.parametrize("on", [True, False])
def test_cuda_graphs_are_switched_by_the_job(tiny, on, monkeypatch):
    from madgen.backbones._unet import UNetBackbone

    forgone = []
    monkeypatch.setattr(UNetBackbone, "disable_cuda_graphs", lambda _: forgone.append(True))
    job = load_job([], [f"backbone.pretrained={tiny}", f"backbone.cuda_graphs={str(on).lower()}"])
    PanoramaSampler.from_job(job)
    assert forgone == ([] if on else [True])
