"""Counts of network passes and projections per step, compilation, and equal latents with shared work."""

import shutil
from collections import Counter

import pytest
import torch
from parameters import combinations

from madgen import Box, PanoramaSampler, Region
from madgen.diffusion.operators import MergeOperator
from madgen.types import Ramp

RUN = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "output": "latent"}
VIEWS, CELLS, VIEW_CELLS = 5, 8 * 16, 8 * 8  # 8x16 latent cells in views of 8x8 every 2
PATHS = 2  # negative and prompt


def sampler(tiny, **method):
    return PanoramaSampler.from_pretrained(str(tiny), dtype="float32", **method)


@pytest.fixture
def work(monkeypatch):
    """Every call of the UNet's linear attention projections, of the UNet itself, and of the loop's split and merge."""
    done = []

    def watch(mad):
        unet = mad.backbone.unet
        unet.register_forward_pre_hook(
            lambda _, given, named: done.append(("unet", len(given[0]), len(named["encoder_hidden_states"]))),
            with_kwargs=True,
        )
        for name, module in unet.named_modules():
            if name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
                module.register_forward_pre_hook(
                    lambda _, given, name=name: done.append((name, given[0].shape[0], given[0].shape[1]))
                )
        return mad

    for name in ("split", "merge"):
        real = getattr(MergeOperator, name)
        monkeypatch.setattr(MergeOperator, name, lambda *a, real=real, name=name: done.append((name, 1, 1)) or real(*a))
    watch.done = done
    return watch


def calls(done, ending):
    return [entry for entry in done if entry[0].endswith(ending)]


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_views_are_evaluated_once_per_step_without_repeating_the_prompt(tiny, work, tau):
    work(sampler(tiny, mad_steps=tau)).sample(["a hill"], seeds=[1], **RUN)
    assert calls(work.done, "unet") == [("unet", PATHS * VIEWS, PATHS)] * RUN["num_inference_steps"]
    assert Counter(name for name, *_ in work.done if name in ("split", "merge")) == {"split": 3, "merge": 3}


@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize("cross_attention", ["scheduled", "always"])
def test_prompt_is_projected_once_per_layer_for_all_views_and_steps(tiny, work, tau, cross_attention):
    mad = work(sampler(tiny, mad_steps=tau, cross_attention=cross_attention))
    mad.sample(["a hill", "the sea"], seeds=[1, 2], **RUN)
    tokens = mad.backbone.tokenizers[0].model_max_length
    for projection in ("attn2.to_k", "attn2.to_v"):
        found = calls(work.done, projection)
        assert len(found) == len({name for name, *_ in found}) == 7
        assert {entry[1:] for entry in found} == {(2 * PATHS, tokens)}


def test_negative_prompts_are_embedded_once_for_all_panoramas(tiny):
    mad, embedded = sampler(tiny, mad_steps=1), []
    mad.backbone.text_encoders[0].register_forward_pre_hook(lambda _, given: embedded.append(len(given[0])))
    expected = mad.sample(["the sea", "a hill"], seeds=[2, 1], negative_prompts=["fog", ""], **RUN)
    assert embedded == [2, 2]
    for prompts, seeds in ((["dunes", "a lake"], [5, 6]), (["the sea", "a hill"], [2, 1])):
        again = mad.sample(prompts, seeds=seeds, negative_prompts=["fog", ""], **RUN)
    assert embedded == [2, 2, 2, 2]
    assert torch.equal(again, expected)
    other = mad.sample(["the sea", "a hill"], seeds=[2, 1], negative_prompts=["snow", ""], **RUN)
    assert embedded == [2, 2, 2, 2, 2, 2]
    assert not torch.equal(other, expected)


def test_sdxl_size_conditions_are_computed_once_per_panorama(tiny_xl, monkeypatch):
    mad, made = PanoramaSampler.from_pretrained(str(tiny_xl), name="sdxl", dtype="float32", mad_steps=1), []
    real = mad.backbone.view_conditions
    monkeypatch.setattr(mad.backbone, "view_conditions", lambda *given: made.append(given[1:]) or real(*given))
    mad.sample(["a hill"], seeds=[1], **RUN)
    assert made == [(VIEWS, 8, 8)]


@pytest.mark.parametrize(
    ("guidance_scale", "chunk_views", "images"), [(3.0, None, [VIEWS]), (1.0, None, [VIEWS]), (3.0, 2, [2, 2, 1] * 2)]
)
def test_first_residual_block_evaluates_each_view_once(tiny, guidance_scale, chunk_views, images):
    """Unless the paths of guidance are passes by themselves."""
    mad, seen = sampler(tiny, mad_steps=0), []
    block = mad.backbone.unet.down_blocks[0].resnets[0]
    block.conv1.register_forward_hook(lambda _, given, made: seen.append(len(made)))
    run = {**RUN, "guidance_scale": guidance_scale}
    mad.sample(["a hill"], seeds=[1], chunk_views=chunk_views, **run)
    assert seen == images * RUN["num_inference_steps"]


def test_guidance_paths_with_different_conditions_share_no_layers(tiny_xl):
    mad = sampler(tiny_xl, name="sdxl", mad_steps=1)
    assert mad.backbone.shared_prefix.layer is None
    seen = []
    mad.backbone.unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda _, x, made: seen.append(len(made)))
    mad.sample(["a hill"], seeds=[1], **RUN)
    assert seen == [PATHS * VIEWS] * RUN["num_inference_steps"]


@pytest.mark.parametrize("tau", [0, 3])
def test_shared_layers_of_guidance_paths_change_nothing(tiny, tau):
    mad, run = sampler(tiny, mad_steps=tau), {"negative_prompts": ["fog", ""], "seeds": [1, 2], **RUN}
    once = mad.sample(["a hill", "the sea"], **run)
    mad.backbone.shared_prefix.layer = None
    twice = mad.sample(["a hill", "the sea"], **run)
    assert float((once - twice).norm() / twice.norm()) <= 1e-5


def test_network_called_directly_is_unchanged(tiny):
    """Whatever was sampled before: what is in common is so within a pass alone."""
    mad = sampler(tiny, mad_steps=1)
    unet, views = mad.backbone.unet, torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = mad.backbone.embed(["a hill"]).hidden_NTD.repeat(4, 1, 1)
    before = unet(views, 500, encoder_hidden_states=prompt).sample

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = unet.mid_block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mad.sample(["a hill"], seeds=[1], **RUN)
    hook.remove()
    assert torch.equal(unet(views, 500, encoder_hidden_states=prompt).sample, before)


CUT_OUT = [Region(Box(0, 0, 32, 32), "a hut"), Region(Box(24, 0, 64, 24), "a tree", "fog")]
BLENDED = [Region(Ramp(1, 2), "dunes"), Region(Ramp(2, 2), "a lake")]
REGIONS = [CUT_OUT, [], BLENDED]
BATCH = {"prompts": ["dunes", "the sea", "a hill"], "seeds": [1, 2, 3], "regions": REGIONS}


@pytest.mark.parametrize("bootstrapped", [0, 1, 3])
def test_regions_share_the_negative_prompt_after_bootstrapping(tiny, work, bootstrapped):
    """Of seven prompts on three canvases: the first canvas has two negative ones, the others one. Only what is cut out
    sees views of its own while it is bootstrapped, and then the first has three."""
    mad = work(sampler(tiny, mad_steps=0, region_bootstrapping=bootstrapped))
    mad.sample(**BATCH, **RUN)
    apart, together = 7 + 3 + 1 + 1, 7 + 2 + 1 + 1
    expected = [apart] * bootstrapped + [together] * (3 - bootstrapped)
    assert calls(work.done, "unet") == [("unet", paths * VIEWS, paths) for paths in expected]


@pytest.mark.slow
def test_syncdiffusion_moves_views_of_each_prompt_so_none_is_shared(tiny, work):
    mad = sampler(tiny, mad_steps=0, sync_weight=1.0, sync_steps=1, sync_network="random", scheduler="DDIMScheduler")
    work(mad).sample(["dunes"], seeds=[1], regions=[BLENDED], **RUN)
    assert calls(work.done, "unet")[-2:] == [("unet", 2 * 3 * VIEWS, 2 * 3)] * 2


@pytest.mark.parametrize(
    ("model", "how", "more"),
    combinations(
        ["tiny", "tiny_xl"],
        [{"mad_steps": 0}, {"mad_steps": 2}, {"region_bootstrapping": 0, "mad_steps": 3}],
        [{}, {"guidance_steps": (0, 2)}, {"chunk_views": 2}],
        one_in=3,
    ),
)
def test_shared_negative_prompts_change_nothing(model, how, more, request, monkeypatch):
    mad = sampler(request.getfixturevalue(model), name="sdxl" if model == "tiny_xl" else "sd", **how)
    given = {**BATCH, "negative_prompts": ["", "rain", ""], **RUN, **more}
    shared = mad.sample(**given)
    monkeypatch.setattr("madgen.sampling.joint_sampler.row_view_ids", lambda regions, bootstrapped: list(range(7)))
    apart = mad.sample(**given)
    assert float((shared - apart).norm() / apart.norm()) <= 1e-5


def test_prompts_are_embedded_once_for_steps_with_guidance_and_without(tiny):
    mad, embedded = sampler(tiny, mad_steps=1), []
    mad.backbone.text_encoders[0].register_forward_pre_hook(lambda _, given: embedded.append(len(given[0])))
    mad.sample(["the sea", "a hill"], seeds=[2, 1], guidance_steps=(1, 2), **RUN)
    assert embedded == [2, 2]


@pytest.mark.parametrize("projection", ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"])
def test_merged_layers_project_the_canvas_and_the_others_the_views(tiny, work, projection):
    work(sampler(tiny, mad_steps=1)).sample(["a hill"], seeds=[1], **RUN)
    tokens = Counter(batch * length for _, batch, length in calls(work.done, projection))
    first = projection.startswith("attn1")  # before the first prompt both paths are one
    layers = [(1, PATHS, 3 - first), (1, 1, first), (2, PATHS, 4)]  # how coarse, of how many paths, how many
    expected = Counter()
    for coarse, paths, count in layers:
        expected[paths * CELLS // coarse**2] += count  # one merged step
        expected[paths * VIEWS * VIEW_CELLS // coarse**2] += 2 * count
    assert tokens == +expected


@pytest.fixture
def graphs():
    """Of torch.compile, since this test began."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_sampler_has_two_graphs_per_size_and_equal_latents(one_block, graphs):
    mad = sampler(one_block, mad_steps=2)
    plain = [mad.sample([prompt], seeds=[seed], **RUN) for prompt, seed in (("a hill", 1), ("the sea at night", 2))]
    mad.backbone.compile("eager")  # graphs are what counts here, not what is made of them
    for seed, (prompt, expected) in enumerate(zip(("a hill", "the sea at night"), plain, strict=True), 1):
        compiled = mad.sample([prompt], seeds=[seed], **RUN)
        assert float((compiled - expected).norm() / expected.norm()) <= 1e-4
        assert graphs() == 2
    other = {**RUN, "num_inference_steps": 1, "width": 40}  # another size: its merged step
    before = mad.sample(["a hill"], seeds=[3], **other)
    assert graphs() == 3
    mad.backbone.compiled = None
    torch.testing.assert_close(mad.sample(["a hill"], seeds=[3], **other), before, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, and there is no g++ here")
@pytest.mark.filterwarnings("ignore")
def test_inductor_gives_equal_latents(one_block, graphs, tmp_path, monkeypatch):
    """`backbone.compile: true` as a user has it: real kernels of both graphs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    mad = sampler(one_block, mad_steps=2)
    expected = mad.sample(["a hill"], seeds=[1], **RUN)
    mad.backbone.compile()
    before = graphs()
    compiled = [mad.sample(["a hill"], seeds=[1], **RUN) for _ in range(2)]
    assert graphs() == before + 2
    assert float((compiled[0] - expected).norm() / expected.norm()) <= 1e-4
    assert torch.equal(*compiled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_sampler_has_separate_graphs_for_one_and_two_guidance_paths(one_block, graphs):
    """By the view and path in turn: one graph is of what both have in common, one of what one path does."""
    mad = sampler(one_block, mad_steps=0)
    ways = [{}, {"chunk_views": VIEWS}, {}]
    plain = [mad.sample(["a hill"], seeds=[1], **RUN, **way) for way in ways]
    mad.backbone.compile("eager")
    for way, expected in zip(ways, plain, strict=True):
        compiled = mad.sample(["a hill"], seeds=[1], **RUN, **way)
        assert float((compiled - expected).norm() / expected.norm()) <= 1e-4
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_decoding_is_compiled_unless_it_needs_gradients(tiny, graphs):
    mad = sampler(tiny, mad_steps=0)
    latents = mad.sample(["a hill"], seeds=[1], **RUN)
    plain = mad.decode_pixels(latents)
    mad.backbone.compile("eager")
    assert graphs() == 0
    torch.testing.assert_close(mad.decode_pixels(latents), plain, atol=1e-5, rtol=1e-5)
    assert graphs() == 1
    mad.decode_pixels(latents)
    mad.backbone.decode(latents.requires_grad_()).sum().backward()
    assert latents.grad is not None
    assert graphs() == 1
    mad.backbone.compiled = None
    assert torch.equal(mad.decode_pixels(latents.detach()), plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_missing_compiler_is_a_one_line_error(madgen, job_file, one_block, tmp_path):
    given = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    settings = ["backbone.compile=true", f"backbone.pretrained={one_block}", f"output.dir={tmp_path / 'out'}"]
    done = madgen("generate", job_file, *settings, **given)
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].startswith(
        "madgen: backbone.compile: PyTorch cannot compile on this machine: InvalidCxx"
    )
    assert "Traceback" not in done.err
    assert not tmp_path.joinpath("out", "dataset.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_syncdiffusion_decodes_uncompiled(one_block, graphs):
    mad = sampler(
        one_block, mad_steps=0, sync_weight=1.0, sync_steps=1, sync_network="random", scheduler="DDIMScheduler"
    )
    mad.backbone.compile("eager")
    mad.sample(["a hill"], seeds=[1], **RUN)
    assert graphs() == 1  # the UNet's
