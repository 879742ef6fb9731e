"""When passes are captured as CUDA graphs, with equal images; without a GPU, see `recorder`."""

import weakref

import pytest
import torch
from recorder import RUN, Recorder, with_graphs

from madgen import PanoramaSampler
from madgen.backbones.acceleration.cuda_graphs import MAX_GRAPHS, Graphs, mapped, signature
from madgen.diffusion.attention import JointStep
from madgen.types import Box, Region


@pytest.fixture
def recorder():
    return Recorder()


METHODS = {
    "overlapping": {"mad_steps": 3},
    "cross-attention throughout": {"mad_steps": 2, "cross_attention": "always"},
    "shifted": {"layout": "shifted", "mad_steps": 4},
    "shifted, then overlapping": {"layout": "shifted", "mad_steps": 3, "overlap_from": 4},
    "whole": {"layout": "whole", "mad_steps": 0},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [64, pytest.param(96, marks=pytest.mark.slow)])
def test_images_equal_those_without_graphs(tiny, recorder, method, width):
    options = {"width": width, **RUN}
    plain = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", **METHODS[method])
    first = plain.sample(["a hill", "the sea"], seeds=[1, 2], **options)
    second = plain.sample(["a wood", "dunes"], seeds=[3, 4], **options)
    graphed = with_graphs(plain, recorder)
    assert torch.equal(graphed.sample(["a hill", "the sea"], seeds=[1, 2], **options), first)
    assert torch.equal(graphed.sample(["a wood", "dunes"], seeds=[3, 4], **options), second)
    passes = len(graphed.backbone.graphs)
    assert recorder.captured == passes
    assert recorder.replayed == 2 * RUN["num_inference_steps"] - passes  # all but the first of its kind


def test_guidance_in_some_steps_and_regions_equal_runs_without_graphs(tiny, recorder):
    options = {
        "seeds": [1],
        "regions": [[Region(Box(0, 0, 20, 32), "a lake")]],
        "width": 64,
        "guidance_steps": (1, 4),
        **RUN,
    }
    plain = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=3)
    expected = plain.sample(["a hill"], **options)
    assert torch.equal(with_graphs(plain, recorder).sample(["a hill"], **options), expected)
    assert recorder.captured
    assert recorder.replayed


def test_guidance_paths_and_prompts_have_separate_graphs(tiny, recorder):
    """Only the former have something in common; their tensors are of the same shapes."""
    sampler, options = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=0), {**RUN, "width": 64}
    asked = [(["a hill"], [1], 3.0), (["a hill", "the sea"], [1, 2], 1.0)] * 2
    plain = [
        sampler.sample(prompts, seeds=seeds, **{**options, "guidance_scale": scale}) for prompts, seeds, scale in asked
    ]
    with_graphs(sampler, recorder)
    for (prompts, seeds, scale), expected in zip(asked, plain, strict=True):
        made = sampler.sample(prompts, seeds=seeds, **{**options, "guidance_scale": scale})
        assert torch.equal(made, expected)
    assert recorder.captured == len(sampler.backbone.graphs) == 2


@pytest.mark.parametrize("family", ["tiny", "tiny_xl"])
def test_temporary_float32_does_not_change_later_images(request, recorder, family):
    """It moves the weights, which graphs read where they were."""
    options = {"seeds": [1], "width": 64, **RUN}
    half = PanoramaSampler.from_pretrained(
        str(request.getfixturevalue(family)), name="sdxl" if "xl" in family else "sd", dtype="bfloat16", mad_steps=3
    )
    expected = half.sample(["a hill"], **options)
    with half.backbone.in_float32():
        in_float32 = half.sample(["a hill"], **options)
    with_graphs(half, recorder)
    assert torch.equal(half.sample(["a hill"], **options), expected)
    before = recorder.captured
    with half.backbone.in_float32():
        assert len(half.backbone.graphs) == 0
        assert torch.equal(half.sample(["a hill"], **options), in_float32)
        assert len(half.backbone.graphs) == 0
    assert torch.equal(half.sample(["a hill"], **options), expected)
    assert recorder.captured == 2 * before
    assert recorder.forgotten == 1


def test_chunks_and_gradients_use_no_graphs(tiny, recorder):
    mad = with_graphs(PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=1), recorder)
    mad.sample(["a hill"], seeds=[1], width=64, chunk_views=2, **RUN)
    assert len(mad.backbone.graphs) == 0
    backbone = mad.backbone
    views = mad.geometry.build(32, 64).at(0)
    conditioning = backbone.encode_prompts(["a hill"], [""], 3.0)
    noise = torch.randn(1, views.count, 4, 8, 8, requires_grad=True)
    joint = JointStep(views, 0, mad.method.merging)
    backbone.predict_noise(noise, torch.tensor(5), conditioning, joint).sum().backward()
    assert len(backbone.graphs) == 0
    with torch.no_grad():
        backbone.predict_noise(noise, torch.tensor(5), conditioning, joint)
    assert noise.grad is not None
    assert len(backbone.graphs) == 1


def test_large_passes_use_no_graphs(tiny, recorder, monkeypatch):
    from madgen.backbones import _unet

    mad = with_graphs(PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=1), recorder)
    cells = 2 * 5 * 8 * 8  # negative and prompt, views, and their cells
    monkeypatch.setattr(_unet, "MAX_CELLS", cells - 1)
    mad.sample(["a hill"], seeds=[1], width=64, **RUN)
    assert len(mad.backbone.graphs) == 0
    monkeypatch.setattr(_unet, "MAX_CELLS", cells)
    mad.sample(["a hill"], seeds=[1], width=64, **RUN)
    assert len(mad.backbone.graphs) == 2


def test_failed_capture_disables_graphs(tiny, capfd):
    class Broken(Recorder):
        def __call__(self, run):
            super().__call__(run)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def forget(self):
            super().forget()
            raise RuntimeError("the device is lost")

    mad, broken = PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=3), Broken()
    expected = mad.sample(["a hill"], seeds=[1], width=64, **RUN)
    capfd.readouterr()
    with_graphs(mad, broken)
    for _ in range(2):
        assert torch.equal(mad.sample(["a hill"], seeds=[1], width=64, **RUN), expected)
    reason = "operation not permitted when stream is capturing"
    said = capfd.readouterr().err.splitlines()
    assert said == [f"madgen: CUDA graphs are disabled, which may be slower: {reason}"]
    assert (broken.captured, broken.replayed, broken.forgotten) == (1, 0, 1)


def test_failed_capture_frees_its_tensors_before_its_pool():
    held, alive = [], []

    class Failing(Recorder):
        def __call__(self, run):
            held.append(weakref.ref(made := run()))
            raise RuntimeError(f"no room for more than {made.shape}")

        def forget(self):
            super().forget()
            alive.extend(reference() is not None for reference in held)

    graphs, given = Graphs(Failing()), (torch.ones(2),)
    for _ in range(2):
        assert graphs(lambda inputs: 2 * inputs[0], "double", given).tolist() == [2, 2]
    assert alive == [False]


class Interrupted(Recorder):
    def __call__(self, run):
        raise KeyboardInterrupt


def test_interrupted_capture_leaves_no_graph():
    recorder, given = Interrupted(), (torch.ones(2),)
    graphs = Graphs(recorder)
    graphs(lambda inputs: 2 * inputs[0], "double", given)
    with pytest.raises(KeyboardInterrupt):
        graphs(lambda inputs: 2 * inputs[0], "double", given)
    assert (len(graphs), recorder.forgotten) == (0, 1)


def test_failed_warm_up_pass_does_not_count(recorder):
    """Its kernels may not have been loaded, which cannot be done in a capture."""
    graphs, given, trouble = Graphs(recorder), (torch.ones(2),), [RuntimeError("no room")]

    def double(inputs):
        if trouble:
            raise trouble.pop()
        return 2 * inputs[0]

    with pytest.raises(RuntimeError, match="no room"):
        graphs(double, "double", given)
    assert graphs(double, "double", given).tolist() == [2, 2]
    assert recorder.captured == 0
    assert graphs(double, "double", given).tolist() == [2, 2]
    assert recorder.captured == 1


def test_memory_is_freed_and_graphs_disabled_on_request(tiny, recorder):
    mad = with_graphs(PanoramaSampler.from_pretrained(str(tiny), dtype="float32", mad_steps=3), recorder)
    assert not mad.backbone.release_memory()
    expected = mad.sample(["a hill"], seeds=[1], width=64, **RUN)
    assert mad.backbone.release_memory()
    assert recorder.forgotten == 1
    assert not mad.backbone.release_memory()
    captured = recorder.captured
    assert torch.equal(mad.sample(["a hill"], seeds=[1], width=64, **RUN), expected)
    assert recorder.captured == 2 * captured
    mad.backbone.disable_cuda_graphs()
    assert torch.equal(mad.sample(["a hill"], seeds=[1], width=64, **RUN), expected)
    assert recorder.captured == 2 * captured
    assert not mad.backbone.release_memory()


def test_all_graphs_are_dropped_beyond_the_limit():
    recorder, given = Recorder(), [torch.ones(length) for length in range(1, MAX_GRAPHS + 2)]
    graphs = Graphs(recorder)
    met = []
    for tensor in [*given, given[-1], given[0], given[0]]:
        assert torch.equal(graphs(lambda inputs: 2 * inputs[0], "double", (tensor,)), 2 * tensor)
        met.append(len(graphs))
    assert met == [*range(1, MAX_GRAPHS + 1), 1, 1, 2, 2]
    assert recorder.captured == 2
    assert recorder.forgotten == 0  # nothing was captured by then


def test_graphs_are_keyed_by_everything_a_pass_depends_on():
    recorder = Recorder()
    graphs = Graphs(recorder)
    for factor in (2, 3):
        for _ in range(3):
            found = graphs(lambda inputs, factor=factor: factor * inputs["x"], factor, {"x": torch.ones(2), "y": None})
            assert found.tolist() == [factor, factor]
    assert recorder.captured == 2


def test_signatures_cover_shapes_and_plain_values_but_not_tensor_contents():
    value = Box(1, 2, 3, 4)
    one = {"a": (torch.zeros(2, 3), 5, None), "b": value}
    assert signature(one) == signature({"a": (torch.ones(2, 3), 5, None), "b": value})
    for other in (
        {"a": (torch.zeros(3, 2), 5, None), "b": value},
        {"a": (torch.zeros(2, 3).double(), 5, None), "b": value},
        {"a": (torch.zeros(3, 2).T, 5, None), "b": value},
        {"a": (torch.zeros(2, 3), 6, None), "b": value},
        {"a": (torch.zeros(2, 3), 5, torch.zeros(1)), "b": value},
        {"a": (torch.zeros(2, 3), 5, None), "b": Box(1, 2, 3, 5)},
    ):
        assert signature(one) != signature(other)


def test_copies_do_not_share_tensors_with_the_original():
    given = {"a": (torch.zeros(2), 5), "b": Box(1, 2, 3, 4)}
    copied = mapped(given, torch.clone)
    given["a"][0].fill_(1)
    assert copied["a"][0].tolist() == [0, 0]
    assert copied["b"] == given["b"]
