"""Sampling with fallbacks: non-finite values and uniform images."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from attempts import SAMPLING, TEXTS, build, raising, tasks
from safetensors.torch import load_file, save_file

from madgen.dataset.sample_json import recorded_inputs
from madgen.generation.regenerate import _sample
from madgen.generation.robust_sampler import with_changes


def rewritten(folder, target, part, change):
    """Copy a pipeline with `change(weights)` applied to a part; all its weights are exact in float16."""
    shutil.copytree(folder, target)
    for file in target.rglob("*.safetensors"):
        weights = load_file(file)
        if file.parent.name == part:
            change(weights)
        save_file({name: tensor.half().float() for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    return target


def too_large_for_float16(weights):
    """Scale the UNet's first convolution: its output overflows float16, and is normalized in the next layer."""
    weights["conv_in.weight"] *= 1e6 / weights["conv_in.weight"].abs().max() / 50


@pytest.fixture(scope="module")
def overflowing(tiny, tmp_path_factory):
    return rewritten(tiny, tmp_path_factory.mktemp("overflowing") / "tiny", "unet", too_large_for_float16)


@pytest.fixture(scope="module")
def sea(tiny, tmp_path_factory):
    """Return a function that copies the pipeline with the embedding of the word `sea` set to a value."""
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(tiny / "tokenizer")("sea").input_ids[1]

    def make(value):
        def change(weights):
            (words,) = (name for name in weights if name.endswith("token_embedding.weight"))
            (places,) = (name for name in weights if name.endswith("position_embedding.weight"))
            weights[words][token] = value
            weights[places] += 600  # shifts all dimensions, which the next normalization removes

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
    monkeypatch.setattr(half.sampler.backbone, "in_float32", raising(torch.OutOfMemoryError("too large")))
    made = half(tasks()[:1])[0]
    assert made.reason == "not_finite"
    assert "in float32: out of memory" in made.detail


def test_regenerate_uses_float32_on_the_weights_as_loaded(tiny, tmp_path):
    """The weights are rounded by float16: sampling the original weights in float32 gives another picture."""
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
