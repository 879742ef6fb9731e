"""Sampling with less memory than needed: smaller batches, views one by one, tiles."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from attempts import SAMPLING, TEXTS, build, raising, tasks
from processes import Forked, environment

from madgen.generation.robust_sampler import is_out_of_memory, within_memory


@pytest.fixture
def attempts(tiny):
    return build(tiny)


@pytest.fixture
def tight(attempts, monkeypatch):
    """Make `sample` and `decode_pixels` run out of memory where `full(...)` says so; returns their calls."""
    calls = []
    sample, decode = attempts.sampler.sample_latents, attempts.sampler.decode_pixels

    def install(full_sample=lambda size, chunk: False, full_decode=lambda mode: False, error=torch.OutOfMemoryError):
        def sample_or_not(batch, params, chunk_views, *on_step):
            calls.append((len(batch.prompts), chunk_views))
            if full_sample(len(batch.prompts), chunk_views):
                raise error("too large")
            return sample(batch, params, chunk_views, *on_step)

        def decode_or_not(latents, loop, mode):
            calls.append(mode)
            if full_decode(mode):
                raise error("too large")
            return decode(latents, loop, mode)

        monkeypatch.setattr(attempts.sampler, "sample_latents", sample_or_not)
        monkeypatch.setattr(attempts.sampler, "decode_pixels", decode_or_not)
        return calls

    return install


def test_images_without_fallbacks_equal_the_samplers(attempts, capfd):
    made = attempts(tasks())
    pictures = attempts.sampler.sample(TEXTS, height=32, width=64, seeds=[10, 11, 12], **SAMPLING)
    assert all(np.array_equal(attempt.image_HWC, picture) for attempt, picture in zip(made, pictures, strict=True))
    assert [(attempt.changes, attempt.reason, attempt.detail) for attempt in made] == [({}, None, "")] * 3
    assert set(attempts.seconds) == {"sample", "decode"}
    assert capfd.readouterr().err == ""


ONE_BY_ONE = [(1, None)] * 3


def close(one, other):
    return all(np.abs(a.image_HWC.astype(int) - b.image_HWC).max() <= 1 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("full", "expected", "last", "message"),
    [
        (lambda size, chunk: size > 2, [(3, None), (2, None), (1, None)], 2, "2 panoramas at a time"),
        pytest.param(
            lambda size, chunk: size > 1,
            [(3, None), (2, None), *ONE_BY_ONE],
            3,
            "one panorama at a time",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda size, chunk: chunk is None,
            [(3, None), (2, None), (1, None), (1, 4), (1, 4), (1, 4)],
            3,
            "one panorama and 4 views at a time",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda size, chunk: chunk != 1,
            [(3, None), (2, None), (1, None), (1, 4), (1, 1), (1, 1), (1, 1)],
            3,
            "one panorama and one view at a time",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_out_of_memory_reduces_the_batch_and_later_batches_start_reduced(
    attempts, tight, capfd, full, expected, last, message
):
    """`expected`: panoramas and views of each attempt; later batches start with the `last` ones."""
    reference = attempts(tasks(width=96))
    calls = tight(full)
    made = attempts(tasks(width=96))
    assert [one for one in calls if one != "auto"] == expected
    assert [attempt.changes for attempt in made] == [{}] * 3
    assert close(made, reference)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"out of memory at 32x96 px, batches of 3; from now on {message}" in lines[0]
    calls.clear()
    attempts(tasks(width=96))
    assert [one for one in calls if one != "auto"] == expected[-last:]
    assert capfd.readouterr().err == ""
    calls.clear()
    attempts(tasks(width=96)[:1])
    assert calls[0] == expected[-1], "a smaller batch starts reduced, too"
    calls.clear()
    attempts(tasks(width=64))
    assert calls[0] == (3, None), "another size starts with the whole batch"


def test_caches_are_freed_before_the_batch_is_reduced(attempts, tight, capfd, monkeypatch):
    caches = ["CUDA graphs"]
    disabled = []
    monkeypatch.setattr(attempts.sampler.backbone, "release_memory", lambda: bool(caches and caches.pop()))
    monkeypatch.setattr(attempts.sampler.backbone, "disable_cuda_graphs", lambda: disabled.append(True))
    calls = tight(full_decode=lambda mode: caches != [])
    assert [attempt.changes for attempt in attempts(tasks())] == [{}] * 3
    assert calls == [(3, None), "auto", "auto", "auto", "auto"]  # the first was decoded again, as before
    assert disabled == [True]
    message = "madgen: out of memory at 32x64 px, batches of 3; from now on without CUDA graphs\n"
    assert capfd.readouterr().err == message


@pytest.mark.slow
def test_cuda_graphs_stay_on_if_freeing_them_does_not_help(attempts, tight, monkeypatch):
    caches = ["CUDA graphs"]
    monkeypatch.setattr(attempts.sampler.backbone, "release_memory", lambda: bool(caches and caches.pop()))
    unexpected = "they were not the cause"
    monkeypatch.setattr(attempts.sampler.backbone, "disable_cuda_graphs", lambda: pytest.fail(unexpected))
    calls = tight(full_sample=lambda size, chunk: size > 1)
    assert [attempt.reason for attempt in attempts(tasks())] == [None] * 3
    assert calls[:4] == [(3, None), (3, None), (2, None), (1, None)]


def test_errors_of_cuda_libraries_count_as_out_of_memory():
    for message in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronous",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(message))
    for message in (
        "CUDA error: an illegal memory access was encountered\nand not out of memory",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "a hint on how not to run out of memory",
    ):
        assert not is_out_of_memory(RuntimeError(message))


def test_out_of_memory_in_decoding_switches_to_tiles_and_is_recorded(attempts, tight, capfd):
    calls = tight(full_decode=lambda mode: mode != "tiled")
    made = attempts(tasks(width=96))
    assert calls == [(3, None), "auto", "tiled", "tiled", "tiled"]
    assert [attempt.changes for attempt in made] == [{"sampling": {"decode": "tiled"}}] * 3
    assert "from now on decoding in tiles" in capfd.readouterr().err
    calls.clear()
    again = attempts(tasks(width=96))
    assert calls == [(3, None), "tiled", "tiled", "tiled"]
    assert [attempt.changes for attempt in again] == [{"sampling": {"decode": "tiled"}}] * 3
    tiled = attempts.sampler.sample(TEXTS, height=32, width=96, seeds=[10, 11, 12], decode="tiled", chunk_views=None,
                                    **SAMPLING)  # fmt: skip
    assert all(np.array_equal(attempt.image_HWC, picture) for attempt, picture in zip(again, tiled, strict=True))


@pytest.mark.slow
def test_configured_tiling_is_not_recorded_as_a_change(tiny, monkeypatch):
    attempts = build(tiny, decode="tiled")
    assert attempts(tasks())[0].changes == {}
    monkeypatch.setattr(attempts.sampler, "decode_pixels", raising(torch.OutOfMemoryError("too large")))
    made = attempts(tasks())
    assert [(attempt.image_HWC, attempt.reason) for attempt in made] == [(None, "out_of_memory")] * 3


@pytest.mark.slow
def test_only_samples_that_never_fit_are_quarantined(attempts, monkeypatch):
    sample = attempts.sampler.sample_latents

    def too_much_for_the_sea(batch, *options):
        if any("sea" in prompt for prompt in batch.prompts):
            raise torch.OutOfMemoryError("too large")
        return sample(batch, *options)

    reference = attempts(tasks())
    monkeypatch.setattr(attempts.sampler, "sample_latents", too_much_for_the_sea)
    made = attempts(tasks())
    assert [attempt.reason for attempt in made] == [None, "out_of_memory", None]
    assert "did not fit into memory" in made[1].detail
    assert close(made[::2], reference[::2])


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you ..."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("too large"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_out_of_memory_errors_are_caught(error, caught):
    assert is_out_of_memory(error) == caught
    if caught:
        assert within_memory(raising(error)) is None
    else:
        with pytest.raises(type(error)):
            within_memory(raising(error))


def test_tensors_of_a_failed_attempt_are_freed_before_the_next():
    import weakref

    held = []

    def make():
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("too large")

    assert within_memory(make) is None
    assert held[0]() is None


REAL = """
from madgen.utils.console import log_to_stderr
log_to_stderr()
import json, resource, sys
import numpy as np
from madgen import PanoramaSampler
from madgen.config.schema import SamplingConfig
from madgen.diffusion.kernels import onednn
from madgen.generation.robust_sampler import RobustSampler
from madgen.types import Prompt, Task

onednn.is_faster = lambda: False  # it keeps kernels of each shape, some 100 MB of address space for all splits

def task(i, width): return Task(f"{i}-0000", Prompt(str(i), "hills at noon", "", 32, width), 0, i)

folder, limit, output, decode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sampler = PanoramaSampler.from_pretrained(folder, dtype="float32", mad_steps=0)
attempts = RobustSampler(sampler, SamplingConfig(num_inference_steps=1, guidance_scale=2.0, decode=decode))
attempts([task(0, 64)])
if limit:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit * 2**20, resource.RLIM_INFINITY))
large, small = attempts([task(1, 8192)])[0], attempts([task(2, 64)])[0]
if large.image_HWC is not None:
    np.save(output, large.image_HWC)
print(json.dumps([large.reason, large.changes, small.reason, list(small.image_HWC.shape)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_sampling_completes_within_a_real_memory_limit(tiny, tmp_path):
    """2045 views at once take about 80 MB here, smaller splits less than 40."""

    def run(limit, decode="whole"):
        output = tmp_path / f"{limit}-{decode}.npy"
        arguments, env = [str(tiny), str(limit), str(output), decode], environment(OMP_NUM_THREADS="1")
        if limit:
            command = [sys.executable, "-c", REAL, *arguments]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            status, out, err = done.returncode, done.stdout, done.stderr
        else:
            process = Forked(tuple(arguments), tmp_path, env, REAL)
            status, (out, err) = process.wait(), process.output()
        assert status == 0, err
        message = [line for line in err.splitlines() if line.startswith("madgen:")]
        return json.loads(out), message, np.load(output) if output.exists() else None

    (reason, changes, *_), message, picture = run(60)
    assert reason is None
    assert len(message) == 1
    assert "at a time" in message[0]
    assert ("decoding in tiles" in message[0]) == (changes == {"sampling": {"decode": "tiled"}})
    (reason, nothing, *_), message, reference = run(0, "tiled" if changes else "whole")
    assert (reason, nothing, message) == (None, {}, [])
    assert np.abs(picture.astype(int) - reference).max() <= 1
    (reason, _, small, shape), _, picture = run(20)
    assert (reason, small, shape, picture) == ("out_of_memory", None, [32, 64, 3], None)
