"""Transformers sampled jointly: layers, positions, sizes, regions, loops."""

import pytest
import torch
from parameters import combinations
from tiny_transformers import FAMILIES, error, folder_of, latents, load, pipeline_of, sampler

from madgen import Box, PanoramaSampler, Region, UserError
from madgen.backbones._tokens import canvas_ids, canvas_of
from madgen.backbones._transformer_family import TransformerFamily
from madgen.diffusion.merge import split
from madgen.diffusion.views import build_layout
from madgen.types import Ramp


@pytest.mark.parametrize(
    ("name", "blocks", "count"),
    [
        ("flux", ["all"], 4),
        ("flux", ["double"], 2),
        ("flux", ["single"], 2),
        ("flux", ["early", "late"], 3),
        ("flux", ["transformer_blocks.1.attn"], 1),
        ("flux", ["single_transformer_blocks.*"], 2),
        ("sd3", ["all"], 6),
        ("sd3", ["early"], 4),
        ("sd3", ["*.attn2"], 2),
        ("sd3", ["transformer_blocks.0.attn2.processor"], 1),
        ("flux2", ["double"], 2),
        ("flux2", ["single"], 2),
        ("z_image", ["all"], 4),
        ("z_image", ["noise_refiner.*"], 1),
        ("z_image", ["late"], 1),
        ("qwen_image", ["early"], 1),
    ],
)
def test_blocks_select_layers_that_change_the_picture(name, blocks, count):
    made = sampler(name, mad_blocks=blocks)
    assert len(made.backbone.merged_layers(made.method.merging)) == count
    if count < len(made.backbone.attention):
        plain, everything = sampler(name, mad_steps=0), sampler(name)
        ours = latents(made)
        assert error(ours, latents(plain)) > 1e-3
        assert error(ours, latents(everything)) > 1e-3


def test_thirds_are_by_depth():
    layers = [
        *(f"transformer_blocks.{i}.attn" for i in range(19)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(38)),
    ]
    groups = TransformerFamily.layer_groups(layers)
    assert [len(groups[name]) for name in ("early", "middle", "late", "double", "single")] == [19, 19, 19, 19, 38]
    assert groups["early"] == groups["double"]
    assert TransformerFamily.selected(layers, ["late"]) == set(layers[38:])


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_matter_in_merged_steps_only(name):
    canvas, fit, local = (latents(sampler(name, positions=kind)) for kind in ("canvas", "fit", "local"))
    assert min(error(canvas, fit), error(canvas, local), error(fit, local)) > 1e-3
    plain, other = (latents(sampler(name, mad_steps=0, positions=kind)) for kind in ("canvas", "local"))
    assert torch.equal(plain, other)


def test_ids_of_the_canvas():
    tokens = build_layout("overlapping", 8, 24, 8, 4).at(0)
    ids = canvas_ids(tokens, "canvas", torch.device("cpu"))
    assert ids[25].tolist() == [0, 1, 1]
    fit = canvas_ids(tokens, "fit", torch.device("cpu"))
    assert fit[:, 2].max() < 8
    assert torch.allclose(fit[:, 2] * 3, ids[:, 2])
    local = canvas_ids(tokens, "local", torch.device("cpu")).unflatten(0, (8, 24))
    assert local[0, :4, 2].tolist() == [0, 1, 2, 3]  # the first view alone covers them
    assert local[0, 4:8, 2].tolist() == [2, 3, 4, 5]  # means of 4..7 and 0..3
    assert torch.equal(local[3, :, 1], torch.full((24,), 3.0))


@pytest.mark.parametrize("name", FAMILIES)
def test_local_positions_close_loops(name, monkeypatch):
    """Rolling the noise by a stride rolls the result; positions of the canvas begin somewhere."""
    made = load(name, positions="local", mad_steps=3)
    draw = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for noise in (draw, draw.roll(8, -1)):
        drawn = noise, [torch.Generator()]
        monkeypatch.setattr("madgen.sampling.joint_sampler.draw_noise", lambda *_, drawn=drawn: drawn)
        results.append(latents(made, loop=True))
    assert error(results[1], results[0].roll(8, -1)) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_chunks_and_prompts_do_not_interact(name):
    made, prompts = sampler(name, mad_blocks=["early"]), ["mountains over the sea", "a city skyline at night"]
    both = latents(made, prompts, seeds=[5, 6])
    for index, prompt in enumerate(prompts):
        assert error(both[index : index + 1], latents(made, [prompt], seeds=[5 + index])) <= 1e-5
    assert error(latents(made, prompts, seeds=[5, 6], chunk_views=2), both) <= 1e-5
    assert torch.equal(latents(made, prompts, seeds=[5, 6]), both)


METHODS = [
    {"layout": "shifted"},
    {"layout": "whole", "view_size": None, "stride": None},
    {"height": 48},
    {"regions": [[Region(Box(0, 0, 32, 32), "a city")]]},
    {"regions": [[Region(Ramp(1, 2), "a city")]]},
    {"overrides": ("method.merge.operator=swap",)},
    {"overrides": ("method.merge.operator=swap", "method.merge.reference_steps=2"), "mad_steps": 0},
    {"overrides": ("method.merge.weights=radial", "method.noise.align=0.5")},
    {"scheduler": "UniPCMultistepScheduler"},
]


@pytest.mark.parametrize(("name", "options"), combinations(FAMILIES, METHODS, one_in=5))
def test_every_method_samples(name, options):
    run = {key: options[key] for key in ("height", "regions") if key in options}
    made = sampler(name, **{key: value for key, value in options.items() if key not in run})
    ours = latents(made, **run)
    assert ours.shape == (1, 4, run.get("height", 32) // 2, 32)
    assert torch.isfinite(ours).all()
    assert made.decode(ours).std() > 0


def test_views_of_a_canvas_are_put_together_exactly():
    canvas = torch.randn(2, 3, 12, 20)
    for layout in ("overlapping", "shifted"):
        for loop in (False, True):
            views = build_layout(layout, 12, 20, 8, 4, loop).at(1)
            assert torch.equal(canvas_of(split(canvas, views), views), canvas)


def test_views_that_differ_are_not_run_as_one_canvas():
    """SyncDiffusion moves each view; merged attention then mixes them layer by layer."""
    made = sampler("flux", sync_weight=20.0, sync_network="random", view_size=16, stride=8)
    shapes = []
    hook = made.backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["hidden_states"].shape[:2]), with_kwargs=True
    )
    assert torch.isfinite(latents(made, num_inference_steps=2)).all()
    hook.remove()
    assert (1, 128) not in shapes
    assert (3, 64) in shapes


def test_the_end_of_a_prompt_beyond_t5s_length_is_named():
    made = PanoramaSampler.from_pretrained(str(folder_of("sd3")), name="sd3")
    assert made.cut_text("mountains over the sea " * 20) is None  # 77 tokens of CLIP are not the limit
    assert made.cut_text("mountains over the sea " * 100) is not None


def test_kept_embeddings_are_those_that_are_encoded():
    made = load("flux")
    plain = latents(made)
    made.backbone.keep_prompts(["mountains over the sea", "a city"])
    assert torch.equal(latents(made), plain)
    assert list(made.backbone._kept) == ["mountains over the sea", "a city"]
    made.backbone.keep_prompts([])
    assert not made.backbone._kept


def test_prompts_of_different_lengths_share_a_pass_and_keep_their_results():
    """Z-Image and Qwen-Image read only the tokens of a prompt: shorter ones are padded and masked."""
    prompts = ["sea", "mountains over the sea and a city skyline at night, a forest, blurry mountains"]
    for name in ("z_image", "qwen_image"):
        made = load(name, mad_blocks=["early"])
        made.backbone.max_sequence_length = 512
        both = latents(made, prompts, seeds=[5, 6])
        for index, prompt in enumerate(prompts):
            assert error(both[index : index + 1], latents(made, [prompt], seeds=[5 + index])) <= 1e-5
        assert error(latents(made, prompts, seeds=[5, 6], chunk_views=2), both) <= 1e-5
        made.backbone.keep_prompts(prompts)
        assert torch.equal(latents(made, prompts, seeds=[5, 6]), both)


def test_the_prompt_of_a_chat_template_is_cut_where_the_encoder_stops():
    made = PanoramaSampler.from_pretrained(
        str(folder_of("z_image")), name="z_image", overrides=["backbone.max_sequence_length=16"]
    )
    tokenizer = made.backbone.pipeline.tokenizer
    prompt = "sea" * 40
    kept = len(prompt) - len(made.cut_text(prompt))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    read = tokenizer.decode(tokenizer(chat, truncation=True, max_length=16).input_ids)
    assert read == f"<|im_start|>user\n{prompt[:kept]}"


def test_noise_of_flux2_is_that_of_its_pipeline():
    made = load("flux2", layout="whole", view_size=None, stride=None, mad_steps=0)
    pipe = pipeline_of("flux2")
    patches = torch.randn(1, 16, 8, 16, generator=torch.Generator().manual_seed(5))
    noise = []
    made.backbone.predict_noise = lambda views, *_: noise.append(views) or torch.zeros_like(views)
    latents(made)
    assert torch.equal(noise[0][:, 0], pipe._unpatchify_latents(patches))


def test_a_guidance_scale_of_z_image_is_one_less_than_that_of_others():
    """Its pipeline adds `scale` times the difference to the conditional prediction; 0 is no guidance."""
    made = sampler("z_image", mad_steps=1)
    assert made.backbone.spec.is_guided(0.5)
    assert not made.backbone.spec.is_guided(0.0)
    with pytest.raises(UserError, match=r"a negative prompt has no effect: guidance_scale=0\.0 is <= 0"):
        latents(made, guidance_scale=0.0, negative_prompts=["fog"])
    assert error(latents(made, guidance_scale=0.5), latents(made, guidance_scale=0.0)) > 1e-3
