"""What may be asked of the sampler from Python."""

import numpy as np
import pytest
import torch

from madgen import PanoramaSampler
from madgen.checks import check_device, check_numbers
from madgen.errors import UserError


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (([1], float("inf"), 5), "guidance_scale must be a finite number, got inf"),
        (([1], float("nan"), 5), "guidance_scale must be a finite number, got nan"),
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
