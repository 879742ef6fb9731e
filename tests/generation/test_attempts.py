"""Sampling with fallbacks: out of memory, non-finite values, uniform images."""

import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from processes import Forked, environment
from safetensors.torch import load_file, save_file

from madgen import PanoramaSampler
from madgen.config.schema import SamplingConfig
from madgen.dataset.sample_json import recorded_inputs
from madgen.generation.regenerate import _sample
from madgen.generation.robust_sampler import RobustSampler, is_out_of_memory, with_changes, within_memory
from madgen.types import Prompt, Task

SAMPLING = {"num_inference_steps": 2, "guidance_scale": 3.0}
TEXTS = ["mountains over a meadow at noon", "the sea at night", "hills"]


def tasks(texts=TEXTS, width=64):
    return [Task(f"{i}-0000", Prompt(str(i), text, "", 32, width), 0, 10 + i) for i, text in enumerate(texts)]


def build(folder, dtype="float32", mad_steps=1, **sampling):
    sampler = PanoramaSampler.from_pretrained(str(folder), dtype=dtype, mad_steps=mad_steps)
    return RobustSampler(sampler, SamplingConfig(**{**SAMPLING, **sampling}))


@pytest.fixture
def attempts(tiny):
    return build(tiny)


@pytest.fixture
def tight(attempts, monkeypatch):
    """Lets `sample` and `decode_pixels` run out of memory where `full(...)` says so; returns what was asked of them."""
    asked = []
    sample, decode = attempts.sampler.sample_latents, attempts.sampler.decode_pixels

    def install(full_sample=lambda size, chunk: False, full_decode=lambda mode: False, error=torch.OutOfMemoryError):
        def sample_or_not(batch, params, chunk_views, *on_step):
            asked.append((len(batch.prompts), chunk_views))
            if full_sample(len(batch.prompts), chunk_views):
                raise error("no room")
            return sample(batch, params, chunk_views, *on_step)

        def decode_or_not(latents, loop, mode):
            asked.append(mode)
            if full_decode(mode):
                raise error("no room")
            return decode(latents, loop, mode)

        monkeypatch.setattr(attempts.sampler, "sample_latents", sample_or_not)
        monkeypatch.setattr(attempts.sampler, "decode_pixels", decode_or_not)
        return asked

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
    ("full", "expected", "last", "said"),
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
    attempts, tight, capfd, full, expected, last, said
):
    """`expected`: panoramas and views of each try; the `last` ones are all that is tried from then on."""
    reference = attempts(tasks(width=96))
    asked = tight(full)
    made = attempts(tasks(width=96))
    assert [one for one in asked if one != "auto"] == expected
    assert [attempt.changes for attempt in made] == [{}] * 3
    assert close(made, reference)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"out of memory at 32x96 px, batches of 3; from now on {said}" in lines[0]
    asked.clear()
    attempts(tasks(width=96))
    assert [one for one in asked if one != "auto"] == expected[-last:]
    assert capfd.readouterr().err == ""
    asked.clear()
    attempts(tasks(width=96)[:1])
    assert asked[0] == expected[-1], "so does a smaller batch"
    asked.clear()
    attempts(tasks(width=64))
    assert asked[0] == (3, None), "another size begins at the top"


def test_caches_are_freed_before_the_batch_is_reduced(attempts, tight, capfd, monkeypatch):
    held = ["CUDA graphs"]
    forgone = []
    monkeypatch.setattr(attempts.sampler, "release_memory", lambda: bool(held and held.pop()))
    monkeypatch.setattr(attempts.sampler, "disable_cuda_graphs", lambda: forgone.append(True))
    asked = tight(full_decode=lambda mode: held != [])
    assert [attempt.changes for attempt in attempts(tasks())] == [{}] * 3
    assert asked == [(3, None), "auto", "auto", "auto", "auto"]  # the first was decoded again, as before
    assert forgone == [True]
    said = "madgen: out of memory at 32x64 px, batches of 3; from now on without CUDA graphs\n"
    assert capfd.readouterr().err == said


@pytest.mark.slow
def test_cuda_graphs_stay_on_if_freeing_them_does_not_help(attempts, tight, monkeypatch):
    held = ["CUDA graphs"]
    monkeypatch.setattr(attempts.sampler, "release_memory", lambda: bool(held and held.pop()))
    monkeypatch.setattr(attempts.sampler, "disable_cuda_graphs", lambda: pytest.fail("they were not to blame"))
    asked = tight(full_sample=lambda size, chunk: size > 1)
    assert [attempt.reason for attempt in attempts(tasks())] == [None] * 3
    assert asked[:4] == [(3, None), (3, None), (2, None), (1, None)]


def test_errors_of_cuda_libraries_count_as_out_of_memory():
    for said in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronous",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(said))
    for said in (
        "CUDA error: an illegal memory access was encountered\nand not out of memory",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "a hint on how not to run out of memory",
    ):
        assert not is_out_of_memory(RuntimeError(said))


def test_out_of_memory_in_decoding_switches_to_tiles_and_is_recorded(attempts, tight, capfd):
    asked = tight(full_decode=lambda mode: mode != "tiled")
    made = attempts(tasks(width=96))
    assert asked == [(3, None), "auto", "tiled", "tiled", "tiled"]
    assert [attempt.changes for attempt in made] == [{"sampling": {"decode": "tiled"}}] * 3
    assert "from now on decoding in tiles" in capfd.readouterr().err
    asked.clear()
    again = attempts(tasks(width=96))
    assert asked == [(3, None), "tiled", "tiled", "tiled"]
    assert [attempt.changes for attempt in again] == [{"sampling": {"decode": "tiled"}}] * 3
    tiled = attempts.sampler.sample(TEXTS, height=32, width=96, seeds=[10, 11, 12], decode="tiled", chunk_views=None,
                                    **SAMPLING)  # fmt: skip
    assert all(np.array_equal(attempt.image_HWC, picture) for attempt, picture in zip(again, tiled, strict=True))


@pytest.mark.slow
def test_configured_tiling_is_not_recorded_as_a_change(tiny, monkeypatch):
    attempts = build(tiny, decode="tiled")
    assert attempts(tasks())[0].changes == {}
    monkeypatch.setattr(attempts.sampler, "decode_pixels", raising(torch.OutOfMemoryError("no room")))
    made = attempts(tasks())
    assert [(attempt.image_HWC, attempt.reason) for attempt in made] == [(None, "out_of_memory")] * 3


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.slow
def test_only_samples_that_never_fit_are_quarantined(attempts, monkeypatch):
    sample = attempts.sampler.sample_latents

    def too_much_for_the_sea(batch, *options):
        if any("sea" in prompt for prompt in batch.prompts):
            raise torch.OutOfMemoryError("no room")
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
        (ValueError("no room"), False),
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
        raise torch.OutOfMemoryError("no room")

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

onednn.is_faster = lambda: False  # it keeps kernels of each shape, some 100 MB of address space for all rungs

def task(i, width): return Task(f"{i}-0000", Prompt(str(i), "hills at noon", "", 32, width), 0, i)

folder, room, output, decode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
sampler = PanoramaSampler.from_pretrained(folder, dtype="float32", mad_steps=0)
attempts = RobustSampler(sampler, SamplingConfig(num_inference_steps=1, guidance_scale=2.0, decode=decode))
attempts([task(0, 64)])
if room:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, resource.RLIM_INFINITY))
large, small = attempts([task(1, 8192)])[0], attempts([task(2, 64)])[0]
if large.image_HWC is not None:
    np.save(output, large.image_HWC)
print(json.dumps([large.reason, large.changes, small.reason, list(small.image_HWC.shape)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_sampling_completes_within_a_real_memory_limit(tiny, tmp_path):
    """2045 views at once take some 80 MB here, the ladder's lower rungs less than 40."""

    def run(room, decode="whole"):
        output = tmp_path / f"{room}-{decode}.npy"
        arguments, env = [str(tiny), str(room), str(output), decode], environment(OMP_NUM_THREADS="1")
        if room:
            command = [sys.executable, "-c", REAL, *arguments]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            status, out, err = done.returncode, done.stdout, done.stderr
        else:
            process = Forked(tuple(arguments), tmp_path, env, REAL)
            status, (out, err) = process.wait(), process.output()
        assert status == 0, err
        said = [line for line in err.splitlines() if line.startswith("madgen:")]
        return json.loads(out), said, np.load(output) if output.exists() else None

    (reason, changes, *_), said, picture = run(60)
    assert reason is None
    assert len(said) == 1
    assert "at a time" in said[0]
    assert ("decoding in tiles" in said[0]) == (changes == {"sampling": {"decode": "tiled"}})
    (reason, nothing, *_), said, reference = run(0, "tiled" if changes else "whole")
    assert (reason, nothing, said) == (None, {}, [])
    assert np.abs(picture.astype(int) - reference).max() <= 1
    (reason, _, small, shape), _, picture = run(20)
    assert (reason, small, shape, picture) == ("out_of_memory", None, [32, 64, 3], None)


def rewritten(folder, target, part, change):
    """A copy of a pipeline with `change(weights)` applied to a part; all its weights are numbers of float16."""
    shutil.copytree(folder, target)
    for file in target.rglob("*.safetensors"):
        weights = load_file(file)
        if file.parent.name == part:
            change(weights)
        save_file({name: tensor.half().float() for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    return target


def too_large_for_float16(weights):
    """The UNet's first convolution: what it gives overflows float16, and is normalised in the next layer."""
    weights["conv_in.weight"] *= 1e6 / weights["conv_in.weight"].abs().max() / 50


@pytest.fixture(scope="module")
def overflowing(tiny, tmp_path_factory):
    return rewritten(tiny, tmp_path_factory.mktemp("overflowing") / "tiny", "unet", too_large_for_float16)


@pytest.fixture(scope="module")
def sea(tiny, tmp_path_factory):
    """Makes pipelines in which the embedding of the word `sea` is set to a value, all others being as they were."""
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(tiny / "tokenizer")("sea").input_ids[1]

    def make(value):
        def change(weights):
            (words,) = (name for name in weights if name.endswith("token_embedding.weight"))
            (places,) = (name for name in weights if name.endswith("position_embedding.weight"))
            weights[words][token] = value
            weights[places] += 600  # a shift of all dimensions, which the next normalisation takes out again

        return rewritten(tiny, tmp_path_factory.mktemp("sea") / "tiny", "text_encoder", change)

    return make


def test_float16_overflow_is_resampled_in_float32(overflowing):
    half, full = build(overflowing, "float16"), build(overflowing, "float32")
    made = half(tasks())
    assert [attempt.reason for attempt in made] == [None] * 3
    assert half.sampler.dtype == torch.float16
    for task, attempt in zip(tasks(), made, strict=True):
        assert attempt.changes == {"backbone": {"dtype": "float32", "weights_dtype": "float16"}}
        assert np.array_equal(attempt.image_HWC, full([task])[0].image_HWC)


def test_only_the_sample_that_overflows_is_resampled(sea):
    folder = sea(torch.tensor([65000.0, 64000.0]).repeat(48))
    half, full = build(folder, "float16"), build(folder, "float32")
    made = half(tasks())
    first = half.sampler.sample(TEXTS, height=32, width=64, seeds=[10, 11, 12], **SAMPLING)
    assert [attempt.changes.get("backbone", {}).get("dtype") for attempt in made] == [None, "float32", None]
    assert np.array_equal(made[1].image_HWC, full(tasks()[1:2])[0].image_HWC)
    for index in (0, 2):
        assert np.array_equal(made[index].image_HWC, first[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nonfinite_in_float32_is_quarantined_without_changing_its_batch(sea, dtype):
    attempts = build(sea(float("nan")), dtype)
    made = attempts(tasks())
    first = attempts.sampler.sample(TEXTS, height=32, width=64, seeds=[10, 11, 12], **SAMPLING)
    assert [attempt.reason for attempt in made] == [None, "not_finite", None]
    assert made[1].image_HWC is None
    assert "100.0% of the latents are not finite" in made[1].detail
    assert ("in float32: " in made[1].detail) == (dtype != "float32")
    for index in (0, 2):
        assert np.array_equal(made[index].image_HWC, first[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bias", "reason"), [(0.3, "constant"), (float("nan"), "not_finite")])
def test_uniform_images_are_quarantined(tiny, tmp_path, dtype, bias, reason):
    def one_colour(weights):
        weights["decoder.conv_out.weight"][:] = 0
        weights["decoder.conv_out.bias"][:] = torch.tensor([-1.0, bias, 0.8])  # channels differ, pixels do not

    attempts = build(rewritten(tiny, tmp_path / "grey", "vae", one_colour), dtype)
    made = attempts(tasks()[:1])[0]
    assert (made.image_HWC, made.reason) == (None, reason)
    assert ("in float32: " in made.detail) == (dtype != "float32")


def test_out_of_memory_in_float32_keeps_the_reason_not_finite(overflowing, monkeypatch):
    half = build(overflowing, "float16")
    monkeypatch.setattr(half.sampler, "in_float32", raising(torch.OutOfMemoryError("no room")))
    made = half(tasks()[:1])[0]
    assert made.reason == "not_finite"
    assert "in float32: out of memory" in made.detail


def test_regenerate_uses_float32_on_the_weights_as_loaded(tiny, tmp_path):
    """Weights that float16 rounds: a float32 run of the whole weights is another picture."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    too_large_for_float16(weights)
    save_file(weights, file, metadata={"format": "pt"})
    attempt = build(folder, "float16")(tasks()[:1])[0]
    lasting = {
        "backbone": {"pretrained": str(folder), "name": "sd", "revision": None, "variant": None, "config": None,
                     "loras": [], "dtype": "float16"},
        "method": {"views": {"layout": "overlapping", "size": None, "stride": None}, "regions": {"bootstrapping": None},
                   "mad": {"steps": 1, "blocks": ["down", "mid", "up"], "cross_attention": "scheduled"}, "sync": {}},
        "sampling": {"scheduler": None, "original_inference_steps": None, "loop": False, "decode": "auto", **SAMPLING},
        "key": "0-0000", "prompt_id": "0", "sample_index": 0,
        "prompt": TEXTS[0], "negative_prompt": "", "height": 32, "width": 64, "seed": 10,
    }  # fmt: skip
    for changes, same in ((attempt.changes, True), ({"backbone": {"dtype": "float32"}}, False)):
        metadata = with_changes(lasting, changes)
        again, _ = _sample(recorded_inputs(metadata, {}), metadata)
        assert np.array_equal(again, attempt.image_HWC) == same


def test_float32_samples_are_recorded_and_regenerated_in_float32(madgen, job_file, overflowing, tmp_path):
    job = ("prompts.limit=1", "prompts.samples_per_prompt=1", f"backbone.pretrained={overflowing}")
    made = madgen("generate", job_file, *job, "backbone.dtype=float16")
    assert made.code == 0, made.err
    (key,) = (
        entry["key"]
        for entry in json.loads((tmp_path / "out/shards/job-000000.json").read_text(encoding="utf-8"))["samples"]
    )
    with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
        backbone = json.load(tar.extractfile(f"{key}.json"))["backbone"]
    assert (backbone["dtype"], backbone["weights_dtype"], backbone["name"]) == ("float32", "float16", "sd")
    again = madgen("regenerate", "out", key, "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.out + again.err


def test_nested_changes_keep_other_keys():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": None}
    changed = with_changes(base, {"b": {"d": {"x": 4}}, "f": {"g": 5}, "h": [6]})
    assert changed == {"a": 1, "b": {"c": 2, "d": {"e": 3, "x": 4}}, "f": {"g": 5}, "h": [6]}
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": None}
