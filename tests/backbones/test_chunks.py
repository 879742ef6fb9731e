"""Chunked views and prompts give the same latents, with and without merging."""

import pytest
import torch
from processes import ROOT

from madgen import PanoramaSampler, UserError
from madgen.types import Box, Region

SIZE = {"height": 32, "width": 64, "num_inference_steps": 2, "output": "latent"}
PROMPTS = {"prompts": ["a hill", "the sea at night"], "seeds": [3, 4]}
VIEWS = 5  # 32x64 px: 8x16 cells in views of 8x8 every 2


def sampler(request, family, **method):
    if family == "lcm":  # 8 pixels a cell
        folder, method = str(ROOT / "tests/parity/golden/tiny-lcm"), {"view_size": 8, "stride": 2, **method}
    else:
        folder = str(request.getfixturevalue({"sd": "tiny", "sdxl": "tiny_xl"}[family]))
    return PanoramaSampler.from_pretrained(folder, name="sdxl" if family == "sdxl" else "sd", dtype="float32", **method)


@pytest.mark.parametrize(
    "method",
    [
        {"mad_steps": 0},
        {"mad_steps": 2},
        pytest.param({"mad_steps": 1, "mad_blocks": ["mid"]}, marks=pytest.mark.slow),
        pytest.param({"mad_steps": 1, "cross_attention": "always"}, marks=pytest.mark.slow),
        pytest.param({"mad_steps": 1, "layout": "shifted"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("family", "guidance_scale"),
    [
        ("sd", 3.0),
        pytest.param("sd", 1.0, marks=pytest.mark.slow),
        ("sdxl", 3.0),
        pytest.param("sdxl", 1.0, marks=pytest.mark.slow),
        ("lcm", 8.0),
    ],
)
def test_chunks_give_the_same_latents(request, family, guidance_scale, method):
    mad = sampler(request, family, **method)
    negatives = ["fog", ""] if family != "lcm" and guidance_scale > 1 else None
    size = {**SIZE, "height": 64, "width": 128} if family == "lcm" else SIZE
    run = {**PROMPTS, **size, "guidance_scale": guidance_scale, "negative_prompts": negatives}
    at_once = mad.sample(**run)
    for chunk_views in (1, 4):
        chunked = mad.sample(chunk_views=chunk_views, **run)
        assert float((chunked - at_once).norm() / at_once.norm()) <= 1e-4


def test_chunks_give_the_same_latents_with_regions_on_a_loop(request):
    mad = sampler(request, "sd", mad_steps=1)
    regions = [[Region(Box(8, 8, 40, 32), "a forest", "fog")], []]
    run = {**PROMPTS, **SIZE, "regions": regions, "loop": True}
    torch.testing.assert_close(mad.sample(chunk_views=3, **run), mad.sample(**run), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mad_steps", "largest"), [(0, 2), (2, VIEWS)])
def test_unet_passes_have_at_most_the_requested_views(request, mad_steps, largest):
    mad = sampler(request, "sd", mad_steps=mad_steps)
    seen = []
    mad.backbone.unet.register_forward_pre_hook(lambda unet, given: seen.append(len(given[0])))
    mad.sample(**PROMPTS, **SIZE, chunk_views=2)
    assert (max(seen), sum(seen)) == (largest, SIZE["num_inference_steps"] * 2 * 2 * VIEWS)
    seen.clear()
    mad.sample(**PROMPTS, **SIZE)
    assert seen == [2 * 2 * VIEWS] * SIZE["num_inference_steps"]


def test_prompt_keys_are_projected_once_with_chunks_too(request):
    mad = sampler(request, "sd", mad_steps=1)
    calls = []
    for name, module in mad.backbone.unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *_: calls.append(1))
    mad.sample(**PROMPTS, **SIZE, chunk_views=2)
    assert len(calls) == 7  # layers


def test_syncdiffusion_gradient_is_the_same_with_one_pass_at_a_time(request):
    backbone = sampler(request, "sd").backbone
    conditioning = backbone.encode_prompts(PROMPTS["prompts"], ["fog", ""], 3.0)
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 1, 4, 8, 8, generator=generator)
    gradients = []
    for chunk_views in (None, 1):
        given = views.clone().requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            noise = backbone.predict_noise(given, torch.tensor(500), conditioning, chunk_views=chunk_views)
        gradients.append((noise.detach(), *torch.autograd.grad(noise.square().sum(), given), sum(kept)))
    torch.testing.assert_close(gradients[1][:2], gradients[0][:2], atol=1e-5, rtol=1e-4)
    assert gradients[1][2] < gradients[0][2] / 20


def test_zero_views_per_chunk_are_refused(request):
    with pytest.raises(UserError, match="chunk_views must be a whole number >= 1, got 0"):
        sampler(request, "sd").sample(**PROMPTS, **SIZE, chunk_views=0)


def flags(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_weights_are_restored_exactly_after_temporary_float32(request, family, dtype, inference_mode):
    mad = sampler(request, family)
    half = type(mad).from_pretrained(
        str(request.getfixturevalue("tiny_xl" if family == "sdxl" else "tiny")),
        name=family, dtype=dtype,
    )  # fmt: skip
    models = half.backbone.models
    before = [flags(model) for model in models]
    assert len(models) == (4 if family == "sdxl" else 3)
    with pytest.raises(ZeroDivisionError), torch.inference_mode(inference_mode), half.backbone.in_float32():
        assert half.dtype == torch.float32
        for model in models:
            assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        raise ZeroDivisionError
    assert half.dtype == getattr(torch, dtype)
    for model, expected in zip(models, before, strict=True):
        for name, (kind, tensor) in flags(model).items():
            assert kind == expected[name][0]
            assert torch.equal(tensor, expected[name][1])
            assert not tensor.is_inference()


def test_temporary_float32_equals_a_float32_run_of_the_same_weights(request):
    half = PanoramaSampler.from_pretrained(str(request.getfixturevalue("tiny")), dtype="float16", mad_steps=1)
    full = sampler(request, "sd", mad_steps=1)
    for ours, theirs in zip(half.backbone.models, full.backbone.models, strict=True):
        theirs.load_state_dict(ours.state_dict())
    run = {**PROMPTS, "height": 32, "width": 64, "num_inference_steps": 2}
    with half.backbone.in_float32():
        pictures = half.sample(**run)
    assert (pictures == full.sample(**run)).all()
    assert not (pictures == half.sample(**run)).all()
