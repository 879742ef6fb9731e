"""Transformers sampled jointly: layers, positions, sizes, regions, loops, and the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parameters import combinations
from tiny_transformers import FAMILIES, folder_of, pipeline_of

from madgen import Box, PanoramaSampler, Region, UserError
from madgen.backbones._blocks import select_layers, transformer_groups
from madgen.backbones._tokens import canvas_ids, canvas_of
from madgen.config.loader import load_job
from madgen.demo import BACKBONES
from madgen.diffusion.merge import split
from madgen.diffusion.views import build_layout
from madgen.hub.weights import ModelFiles
from madgen.types import Ramp

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"
RUN = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "seeds": [5]}


SAMPLERS = {}


def sampler(name, **options):
    """Return a sampler; those with the same options are loaded once."""
    key = f"{name} {sorted(options.items())}"
    if key not in SAMPLERS:
        SAMPLERS[key] = load(name, **options)
    return SAMPLERS[key]


def load(name, *, mad_steps=2, view_size=16, stride=4, **options):
    loaded = PanoramaSampler.from_pretrained(
        str(folder_of(name)),
        name=name,
        view_size=view_size,
        stride=stride,
        mad_steps=mad_steps,
        dtype="float32",
        **options,
    )
    loaded.backbone.max_sequence_length = 256 if name == "qwen_image" else 16  # faster; Qwen-Image's template is long
    return loaded


def latents(made, prompts=("mountains over the sea",), **options):
    return made.sample(list(prompts), output="latent", **{**RUN, **options})


def error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


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
    groups = transformer_groups(layers)
    assert [len(groups[name]) for name in ("early", "middle", "late", "double", "single")] == [19, 19, 19, 19, 38]
    assert groups["early"] == groups["double"]
    assert select_layers(layers, groups, ["late"]) == set(layers[38:])


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
def test_local_positions_close_loops(name):
    """Rolling the noise by a stride rolls the result; positions of the canvas begin somewhere."""
    made = load(name, positions="local", mad_steps=3)
    draw = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for noise in (draw, draw.roll(8, -1)):
        made._noise = lambda batch, scheduler, noise=noise: (noise, [torch.Generator()])
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


def test_syncdiffusion_without_a_predicted_image_is_refused():
    with pytest.raises(UserError, match=r"UniPCMultistepScheduler does not expose.*example FlowMatchEulerDiscrete"):
        latents(load("flux", sync_weight=20.0, sync_network="random", scheduler="UniPCMultistepScheduler"))


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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux", {"cross_attention": "always"}, "method.mad.cross_attention=always does not apply"),
        ("sd3", {"cross_attention": "always"}, "method.mad.cross_attention=always does not apply"),
        ("sd3", {"mad_blocks": ["single"]}, "'single' of this backbone has no attention layers; remove it"),
        ("flux", {"mad_blocks": ["down"]}, "'down' is neither early, middle, late, double, single nor a pattern"),
        ("flux", {"view_size": 15}, "method.views.size=15 must be a multiple of 2 latent cells"),
        ("flux", {"stride": 3}, "multiples of 2 latent cells"),
        ("sd3", {"view_size": 50, "stride": 2}, "method.views.size=50 must be <= 48 latent cells"),
        ("flux2", {"mad_blocks": ["up"]}, "'up' is neither early, middle, late, double, single nor a pattern"),
        ("z_image", {"mad_blocks": ["double"]}, "'double' of this backbone has no attention layers; remove it"),
        ("z_image", {"mad_blocks": ["context_refiner.*"]}, r"'context_refiner.\*' is neither early"),
        ("qwen_image", {"mad_blocks": ["single"]}, "'single' of this backbone has no attention layers; remove it"),
        ("qwen_image", {"cross_attention": "always"}, "method.mad.cross_attention=always does not apply"),
        ("z_image", {"scheduler": "DDIMScheduler"}, "scheduler=DDIMScheduler cannot step this backbone"),
        (
            "qwen_image",
            {"scheduler": "FlowMatchHeunDiscreteScheduler"},
            "FlowMatchHeunDiscreteScheduler does not support the checkpoint's shift_terminal=0.02",
        ),
        (
            "flux",
            {"scheduler": "DDIMScheduler"},
            "scheduler=DDIMScheduler cannot step this backbone, which is a flow-matching model; use for example",
        ),
        ("flux", {"mad_blocks": ["late", "nothing*"]}, "'nothing\\*' is neither early"),
    ],
)
def test_settings_without_meaning_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        latents(sampler(name, **options), height=100 if options.get("view_size") == 50 else 32, width=128)


def test_a_canvas_beyond_the_positions_is_refused_or_fitted():
    with pytest.raises(
        UserError, match=r"width=128 px is too large for method.mad.positions=canvas.*96 px; set method.mad"
    ):
        latents(sampler("sd3"), width=128)
    with pytest.raises(UserError, match="width=128 px is too large for layout=whole"):
        latents(sampler("sd3", layout="whole", view_size=None, stride=None), width=128)
    for options in ({"positions": "fit"}, {"positions": "local"}, {"mad_steps": 0}):
        assert latents(sampler("sd3", **options), width=128).shape == (1, 4, 16, 64)


def without_guidance(folder):
    shutil.copytree(folder_of("flux"), folder)
    config = folder / "transformer/config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"guidance_embeds": False}), encoding="utf-8"
    )
    return folder


def test_guidance_that_has_no_effect_is_refused(tmp_path):
    from madgen.backbones import backbone_module

    spec = backbone_module("flux").describe(ModelFiles(str(without_guidance(tmp_path / "schnell"))))
    assert spec.guidance == "none"
    with pytest.raises(UserError, match=r"guidance_scale=3.5 has no effect.*set it to 0"):
        spec.check_guidance(3.5, [])
    with pytest.raises(UserError, match="a negative prompt has no effect: the backbone takes no guidance"):
        spec.check_guidance(0.0, ["fog"])


def test_a_pipeline_of_another_class_is_refused(tiny):
    pairs = {"flux": folder_of("sd3"), "sd3": folder_of("flux"), "flux2": tiny, "sd": folder_of("z_image")}
    for name, folder in pairs.items():
        with pytest.raises(UserError, match=rf"is a \w+Pipeline; backbone.name={name} loads"):
            PanoramaSampler.from_pretrained(str(folder), name=name)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("flux", 513, "must be in 1..512"),
        ("sd3", 0, "must be > 0"),
        ("sd", 77, "has no effect"),
        ("flux2", 3, "must be in 4..512"),
        ("qwen_image", 1025, "must be in 1..1024"),
    ],
)
def test_an_impossible_sequence_length_is_refused(name, length, message, tiny):
    from madgen.config.schema import BackboneConfig, MethodConfig

    with pytest.raises(
        UserError, match=f"backbone.max_sequence_length={length} {message}|max_sequence_length {message}"
    ):
        folder = str(tiny if name == "sd" else folder_of(name))
        PanoramaSampler.from_configs(
            BackboneConfig(name=name, pretrained=folder, max_sequence_length=length), MethodConfig()
        )


def test_the_end_of_a_prompt_beyond_t5s_length_is_named():
    made = PanoramaSampler.from_pretrained(str(folder_of("sd3")), name="sd3")
    assert made.cut_text("mountains over the sea " * 20) is None  # 77 tokens of CLIP are not the limit
    assert made.cut_text("mountains over the sea " * 100) is not None


def tiny_overrides(job, folder):
    return [
        f"backbone.pretrained={folder}", "backbone.dtype=float32", "method.views.size=16", "method.views.stride=4",
        "sampling.height=32", "sampling.width=64", "prompts.source=prompts.txt", "output.dir=out",
        "monitor.wandb.mode=disabled", "trainer.accelerator=cpu", f"sampling.num_inference_steps={min(3, job)}",
    ]  # fmt: skip


def run(madgen_here, *arguments):
    result = madgen_here(*arguments)
    assert result.code == 0, result.err
    return result.out


COMMAND_PRESETS = [
    "flux-dev",
    "sd35-medium",
    *(pytest.param(preset, marks=pytest.mark.slow) for preset in ("flux2-klein-base-4b", "z-image", "qwen-image")),
]


@pytest.mark.parametrize("preset", COMMAND_PRESETS)
def test_the_command_line_generates_verifies_and_regenerates(madgen_here, tmp_path, preset):
    (tmp_path / "prompts.txt").write_text("mountains over the sea\na city skyline at night\n", encoding="utf-8")
    name = load_job([CONFIGS / f"{preset}.yaml"]).backbone.name
    overrides = [*tiny_overrides(3, folder_of(name)), "backbone.max_sequence_length=16", "method.mad.blocks=[late]"]
    plan = json.loads(run(madgen_here, "plan", CONFIGS / f"{preset}.yaml", *overrides, "--json"))
    assert plan["samples"] == 2
    assert plan["view_evaluations"] == 2 * 5 * 3 * (1 if name == "flux" else 2)
    run(madgen_here, "generate", CONFIGS / f"{preset}.yaml", *overrides)
    run(madgen_here, "verify", "out")
    key = next(iter(json.loads(next((tmp_path / "out/shards").glob("*.json")).read_text(encoding="utf-8"))["samples"]))[
        "key"
    ]
    assert "the same pixels" in run(madgen_here, "regenerate", "out", key, "-o", "again.png")


@pytest.mark.parametrize(
    ("name", "blocks", "layout"),
    [("flux", "[all]", "overlapping"), ("sd3", "[all]", "shifted"), ("qwen_image", "[late]", "overlapping")],
)
def test_plan_counts_what_the_transformer_runs(madgen_here, tmp_path, name, blocks, layout):
    """Steps in which all layers merge run the canvas of two views once, others run each view."""
    (tmp_path / "prompts.txt").write_text("mountains over the sea\n", encoding="utf-8")
    overrides = [*tiny_overrides(3, folder_of(name)), "method.mad.steps=2", f"method.mad.blocks={blocks}"]
    overrides += [f"backbone.name={name}", "sampling.guidance_scale=3", f"method.views.layout={layout}"]
    plan = json.loads(run(madgen_here, "plan", CONFIGS / "flux-dev.yaml", *overrides, "--json"))
    made, cells = sampler(name, mad_blocks=[blocks.strip("[]")], layout=layout), []
    original = made.backbone._pass
    made.backbone._pass = lambda views, *rest: cells.append(views[:, :, 0].numel()) or original(views, *rest)
    latents(made)
    made.backbone._pass = original
    assert plan["view_evaluations"] == sum(cells) / 16**2


def tar(tmp_path, name):
    return next((tmp_path / name / "shards").glob("*.tar")).read_bytes()


def test_text_encoders_run_once_per_prompt_of_a_shard_and_may_be_offloaded(madgen_here, tmp_path, monkeypatch):
    from madgen.backbones import sd3

    (tmp_path / "prompts.txt").write_text("mountains over the sea\na city skyline at night\n", encoding="utf-8")
    encoded, embed = [], sd3.StableDiffusion3.embed
    monkeypatch.setattr(
        sd3.StableDiffusion3, "embed", lambda self, prompt: encoded.append(prompt) or embed(self, prompt)
    )
    job = [CONFIGS / "sd35-medium.yaml", *tiny_overrides(2, folder_of("sd3")), "backbone.max_sequence_length=16"]
    job += ["prompts.samples_per_prompt=2", "prompts.negative_prompt=blurry"]
    run(madgen_here, "generate", *job)
    assert sorted(encoded) == ["a city skyline at night", "blurry", "mountains over the sea"]
    for offload in ("text_encoders", "model"):
        run(madgen_here, "generate", *job, f"backbone.offload={offload}", f"output.dir={offload}")
        assert tar(tmp_path, offload) == tar(tmp_path, "out")
    encoded.clear()
    run(madgen_here, "generate", *job, "output.samples_per_shard=2", "output.dir=shards")
    assert sorted(encoded) == ["a city skyline at night", "blurry", "mountains over the sea"]  # `blurry` is in both


def test_kept_embeddings_are_those_that_are_encoded():
    made = load("flux")
    plain = latents(made)
    made.backbone.keep_prompts(["mountains over the sea", "a city"])
    assert torch.equal(latents(made), plain)
    assert list(made.backbone._kept) == ["mountains over the sea", "a city"]
    made.backbone.keep_prompts([])
    assert not made.backbone._kept


def test_offloading_of_unets_is_refused(tiny):
    with pytest.raises(UserError, match=r"backbone\.offload=model is not supported for UNets; set it to none"):
        PanoramaSampler.from_pretrained(str(tiny), overrides=["backbone.offload=model"])


PRESET_OF = {"flux": "flux-dev", "sd3": "sd35-medium", "z_image": "z-image-turbo"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PRESET_OF))
def test_processes_and_resume_points_do_not_change_the_bytes(start, tmp_path, name):
    """Two processes share the shards; then one shard is made again, as after a crash."""
    (tmp_path / "prompts.txt").write_text(
        "mountains over the sea\na city skyline at night\nthe sea\n", encoding="utf-8"
    )
    preset = CONFIGS / f"{PRESET_OF[name]}.yaml"
    job = [preset, *tiny_overrides(2, folder_of(name)), "backbone.max_sequence_length=16"]
    job += ["output.samples_per_shard=1", "method.mad.blocks=[early]", "method.mad.steps=1"]
    assert start("generate", *job).wait() == 0
    shared = [start("generate", *job, "output.dir=shared") for _ in range(2)]
    assert [process.wait() for process in shared] == [0, 0]
    one, two = (sorted((tmp_path / name / "shards").glob("*.tar")) for name in ("out", "shared"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    before = one[1].read_bytes()
    one[1].unlink()
    one[1].with_suffix(".json").unlink()
    assert start("generate", *job, "sampling.batch_size=1").wait() == 0
    assert one[1].read_bytes() == before


def lora(folder, layers, names):
    """Write a LoRA of rank 2 with alpha 1; `names` are those of the file's factors."""
    from safetensors.torch import save_file

    generator, state = torch.Generator().manual_seed(0), {}
    for layer, (width, out) in layers.items():
        for name, shape in zip(names, ((2, width), (out, 2)), strict=True):
            state[f"{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
        if names[0] == "lora_down":
            state[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(state, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "layers", "names"),
    [
        ("flux", {"transformer.transformer_blocks.0.attn.to_q": (32, 32)}, ("lora_A", "lora_B")),
        ("flux", {"lora_unet_double_blocks_0_img_attn_qkv": (32, 96)}, ("lora_down", "lora_up")),
        ("sd3", {"transformer.transformer_blocks.1.ff.net.2": (128, 32)}, ("lora_A", "lora_B")),
        ("flux2", {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (32, 288)}, ("lora_A", "lora_B")),
        ("z_image", {"transformer.layers.1.attention.to_q": (48, 48)}, ("lora_A", "lora_B")),
        ("qwen_image", {"transformer.transformer_blocks.0.attn.to_q": (32, 32)}, ("lora_A", "lora_B")),
    ],
    ids=["flux", "flux-kohya", "sd3", "flux2", "z_image", "qwen_image"],
)
def test_loras_are_fused_as_diffusers_fuses_them(tmp_path, name, layers, names):
    import diffusers

    file = lora(tmp_path, layers, names)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder_of(name))
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(file, adapter_name="style")
    pipe.fuse_lora(components=["transformer"], lora_scale=0.7, adapter_names=["style"])
    pipe.unload_lora_weights()
    fused = load(name, loras=[{"weights": file, "scale": 0.7}]).backbone.transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        assert torch.allclose(fused[key], value, atol=1e-6)
    changed = sum(not torch.equal(fused[key], value) for key, value in before.items())
    assert changed == (3 if "lora_unet" in str(layers) else 1)  # q, k and v


def test_a_lora_that_diffusers_cannot_convert_is_refused(tmp_path):
    layers = {"lora_unet_joint_blocks_0_x_block_attn_qkv": (32, 96)}
    file = lora(tmp_path, layers, ("lora_down", "lora_up"))
    with pytest.raises(
        UserError, match="has kohya's layout, which diffusers cannot convert for StableDiffusion3Pipeline"
    ):
        load("sd3", loras=[{"weights": file, "scale": 1.0}])


PRESETS = [
    path.stem
    for path in sorted(CONFIGS.glob("*.yaml"))
    if load_job([path]).backbone.name in FAMILIES and path.stem not in BACKBONES  # the demo has its own tests
]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_plan_on_pipelines_of_their_layout(madgen_here, tmp_path, preset):
    (tmp_path / "prompts.txt").write_text("mountains over the sea\n", encoding="utf-8")
    job = load_job([CONFIGS / f"{preset}.yaml"])
    folder = folder_of(job.backbone.name)
    if job.backbone.name == "flux" and job.sampling.guidance_scale <= 1:
        folder = without_guidance(tmp_path / "distilled")
    if preset == "flux2-klein-4b":
        folder = folder_of("flux2-distilled")
    overrides = tiny_overrides(job.sampling.num_inference_steps, folder)
    plan = json.loads(run(madgen_here, "plan", CONFIGS / f"{preset}.yaml", *overrides, "--json"))
    assert not plan["spec_is_assumed"]
    assert job.method.mad.steps < job.sampling.num_inference_steps
    assert job.sampling.height == 1024


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


@pytest.mark.parametrize("key", ["guidance_embeds", "use_layer3d_rope", "use_additional_t_cond"])
def test_other_transformers_of_qwen_image_are_refused(tmp_path, key):
    folder = shutil.copytree(folder_of("qwen_image"), tmp_path / "qwen", ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {key: True}), encoding="utf-8")
    with pytest.raises(UserError, match=f"a transformer with {key} is not supported"):
        PanoramaSampler.from_pretrained(str(folder), name="qwen_image")


def test_a_guidance_scale_of_z_image_is_one_less_than_that_of_others():
    """Its pipeline adds `scale` times the difference to the conditional prediction; 0 is no guidance."""
    made = sampler("z_image", mad_steps=1)
    assert made.backbone.spec.is_guided(0.5)
    assert not made.backbone.spec.is_guided(0.0)
    with pytest.raises(UserError, match=r"a negative prompt has no effect: guidance_scale=0\.0 is <= 0"):
        latents(made, guidance_scale=0.0, negative_prompts=["fog"])
    assert error(latents(made, guidance_scale=0.5), latents(made, guidance_scale=0.0)) > 1e-3


def test_steps_that_the_schedule_of_qwen_image_cannot_take_are_refused():
    """Its sigmas are stretched to end at a value of their own, which one step cannot reach."""
    with pytest.raises(UserError, match=r"num_inference_steps=1 is not possible.*next possible number is 2"):
        latents(sampler("qwen_image"), num_inference_steps=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.scheduler_options={shift: 0}", "the shift of the timesteps must be > 0, got 0"),
        ("sampling.scheduler_options={shift: -3}", "the shift of the timesteps must be > 0, got -3"),
        ("backbone.prediction_type=epsilon", "backbone.prediction_type=epsilon does not apply: flow-matching models"),
        ("backbone.max_sequence_length=600", "backbone.max_sequence_length=600 must be in 1..24 tokens"),
        ("backbone.name=sd", "is a FluxPipeline; backbone.name=sd loads"),
        ("backbone.name=sd3", "set backbone.name=flux"),
        ("trainer.accelerator=tpu", "trainer.accelerator must be one of auto, cpu, gpu, cuda, got 'tpu'"),
    ],
)
def test_plan_and_generate_refuse_what_does_not_apply(refused, madgen_here, tmp_path, override, message):
    (tmp_path / "prompts.txt").write_text("the sea\n", encoding="utf-8")
    job = [CONFIGS / "demo-dit.yaml", "prompts.source=prompts.txt", "output.dir=out", override]
    assert message in refused("plan", *job)
    assert message in refused("generate", *job)
