"""What may be asked of the sampler from Python."""

import re

import numpy as np
import pytest
import torch

from madgen import PanoramaSampler
from madgen.checks import check_device, check_guidance_steps, check_numbers
from madgen.errors import UserError


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (([1], float("inf"), 5), "guidance_scale must be a finite number >= 0, got inf"),
        (([1], float("nan"), 5), "guidance_scale must be a finite number >= 0, got nan"),
        (([1], -1.0, 5), "guidance_scale must be a finite number >= 0, got -1.0"),
        (([1], 3.0, 5, 0), "chunk_views must be a whole number of views >= 1 or None, got 0"),
        (([1], 3.0, 5, 1.5), "chunk_views must be a whole number of views >= 1 or None, got 1.5"),
        (([1], 3.0, 0), "num_inference_steps must be a whole number >= 1, got 0"),
        (([1], 3.0, 2.5), "num_inference_steps must be a whole number >= 1, got 2.5"),
        (([1, -1], 3.0, 5), r"a seed must be a whole number of 0..2\^64 - 1, got -1"),
        (([2**64], 3.0, 5), r"a seed must be a whole number of 0..2\^64 - 1, got 18446744073709551616"),
        ((["1"], 3.0, 5), r"a seed must be a whole number of 0..2\^64 - 1, got 1"),
    ],
)
def test_numbers_that_are_none_are_refused(numbers, said):
    with pytest.raises(UserError, match=said):
        check_numbers(*numbers)


@pytest.mark.parametrize("steps", [(0.5, 2), (2, 2), (0, 6), (-1, 2), (1,), ("0", "2")])
def test_guidance_steps_are_two_whole_numbers_in_order(steps):
    check_guidance_steps((np.int64(0), 5), 3.0, 5)
    with pytest.raises(UserError, match=r"guidance_steps must be \(first, end\), 0 <= first < end <= 5 steps"):
        check_guidance_steps(steps, 3.0, 5)


def test_negative_prompts_are_a_list():
    sampler = PanoramaSampler.from_pretrained("demo")
    with pytest.raises(UserError, match="negative_prompts must be a list, got 'ab'"):
        sampler.sample(["a", "b"], negative_prompts="ab", height=128, width=256, seeds=[1, 2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"height": "128"}, "height must be a whole number, got '128'"),
        ({"width": 256.0}, "width must be a whole number, got 256.0"),
        ({"regions": [[{"mask": [0, 0, 64, 64]}]]}, "regions must hold lists of madgen.Region, got {'mask'"),
        ({"regions": []}, "need a list of regions for each of 1 prompts, got 0"),
    ],
)
def test_what_is_of_another_kind_is_refused(options, said):
    sampler = PanoramaSampler.from_pretrained("demo")
    with pytest.raises(UserError, match=re.escape(said)):
        sampler.sample(["a"], **{"height": 128, "width": 256, "seeds": [1], **options})


def test_numbers_may_be_of_another_library():
    check_numbers([0, np.int64(3), torch.tensor(4), 2**64 - 1], np.float32(3), np.int32(5))


def test_devices_that_are_not_here_are_refused_before_anything_is_loaded():
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device='gpu' is none that PyTorch knows; cpu and cuda are two of them"):
        PanoramaSampler.from_pretrained("demo", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda': PyTorch finds no GPU here; take cpu"):
            PanoramaSampler.from_pretrained("demo", device="cuda")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "x"}, "method.views.layout must be one of overlapping, shifted, whole, got 'x'"),
        ({"stride": 0}, "method.views.stride must be > 0 latent cells, got 0"),
        ({"mad_steps": -1}, "method.mad.steps must be >= 0, got -1"),
        ({"mad_steps": 2.5}, "mad_steps must be a whole number, got 2.5"),
        ({"stride": "16"}, "stride must be a whole number, got '16'"),
        ({"sync_weight": 20.0, "sync_steps": 0}, "method.sync.steps=0 leaves method.sync.weight=20 without effect"),
    ],
)
def test_what_no_job_may_ask_for_is_refused_before_anything_is_loaded(options, said, monkeypatch):
    from madgen.backbones import sd

    monkeypatch.setattr(sd, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=said):
        PanoramaSampler.from_pretrained("demo", **options)


@pytest.mark.parametrize("on", [True, False])
def test_cuda_graphs_are_switched_by_the_job(on, monkeypatch):
    from madgen import load_job

    forgone = []
    monkeypatch.setattr(PanoramaSampler, "forgo_graphs", lambda _: forgone.append(True))
    PanoramaSampler.from_job(load_job([], [f"backbone.cuda_graphs={str(on).lower()}"]))
    assert forgone == ([] if on else [True])
