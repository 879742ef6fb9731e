"""Compare transformers with diffusers: its pipelines, stored outputs, and a plain loop over views."""

import ast
import json
import shutil
from functools import lru_cache
from pathlib import Path

import diffusers
import flow_reference
import numpy as np
import pytest
import torch
from parameters import combinations
from tiny_transformers import folder_of

from madgen import PanoramaSampler
from madgen.config.schema import BackboneConfig, MadConfig, MethodConfig, SamplingParams, ViewsConfig

GOLDEN = Path(__file__).parent / "golden" / "dit"
PROMPTS, SEEDS = ["mountains over the sea", "a city skyline at night"], [7, 11]
SETTINGS = {
    "flux-dev": {"guidance_scale": 3.5, "length": 32},
    "flux-schnell": {"guidance_scale": 0.0, "length": 16},
    "sd3": {"guidance_scale": 4.5, "length": 24},
    "flux2": {"guidance_scale": 3.0, "length": 24},
    "flux2-distilled": {"guidance_scale": 1.0, "length": 24},
    "z_image": {"guidance_scale": 3.0, "length": 24},
    "qwen_image": {"guidance_scale": 3.0, "length": 256},  # the template of the prompt comes first
}
FAMILIES = list(SETTINGS)


def error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the tiny pipelines; [schnell] is [dev] without its guidance embedding and with a static shift."""
    schnell = tmp_path_factory.mktemp("flux") / "tiny-flux-schnell"
    shutil.copytree(GOLDEN / "tiny-flux-dev", schnell)
    network = diffusers.FluxTransformer2DModel.from_pretrained(schnell, subfolder="transformer")
    new = diffusers.FluxTransformer2DModel.from_config(network.config, guidance_embeds=False)
    new.load_state_dict(network.state_dict(), strict=False)
    new.save_pretrained(schnell / "transformer")
    config = schnell / "scheduler/scheduler_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"use_dynamic_shifting": False, "shift": 1.0}),
        encoding="utf-8",
    )
    built = {name: folder_of(name) for name in FAMILIES if "flux-" not in name}
    return {"flux-dev": GOLDEN / "tiny-flux-dev", "flux-schnell": schnell, **built}


@pytest.fixture(scope="module")
def pipelines(folders):
    return lru_cache(lambda family: diffusers.DiffusionPipeline.from_pretrained(folders[family]))


def family_of(folder):
    return folder.name.removeprefix("tiny-").partition("-")[0]


def sampler(folder, *, length=None, scheduler=None, layout="overlapping", size=None, stride=None, **mad):
    return PanoramaSampler.from_configs(
        BackboneConfig(name=family_of(folder), pretrained=str(folder), dtype="float32", max_sequence_length=length),
        MethodConfig(views=ViewsConfig(layout=layout, size=size, stride=stride), mad=MadConfig(**{"steps": 0, **mad})),
        SamplingParams(scheduler=scheduler),
    )


def sample(made, family, height, width, steps, prompts=PROMPTS, seeds=SEEDS, **options):
    return made.sample(
        prompts, height=2 * height, width=2 * width, num_inference_steps=steps, seeds=seeds, output="latent",
        **{"guidance_scale": SETTINGS[family]["guidance_scale"], **options},
    )  # fmt: skip


STORED = [
    pytest.param(path.stem, marks=[pytest.mark.slow] if "multidiffusion" in path.stem else [])
    for path in sorted(GOLDEN.glob("*.npz"))
]


@pytest.mark.parametrize("name", STORED)
def test_latents_and_pixels_equal_those_that_diffusers_stored(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        stored, meta = {key: archive[key] for key in archive.files}, ast.literal_eval(str(archive["meta"]))
    views = {"layout": "whole"}
    if "view_size" in meta:
        views = {"size": meta["view_size"], "stride": meta["stride"]}
    made = sampler(GOLDEN / meta["folder"], length=meta["max_sequence_length"], **views)
    latents = sample(
        made, name.split("_")[0], meta["height"] // 2, meta["width"] // 2, meta["steps"], meta["prompts"],
        meta["seeds"], negative_prompts=meta.get("negative_prompts"), guidance_scale=meta["guidance_scale"],
    )  # fmt: skip
    if "pixels" in stored:
        pixels = made.decode_pixels(latents).permute(0, 2, 3, 1)
        assert np.abs(pixels.numpy() - stored["pixels"]).max() <= 1e-4
    else:
        assert error(latents, torch.from_numpy(stored["latents"])) <= 1e-5


def pipeline_latents(pipe, family, height, width, steps, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = SETTINGS[family]
    options = {"guidance_scale": settings["guidance_scale"], "max_sequence_length": settings["length"], **options}
    if family == "qwen_image":
        options["true_cfg_scale"] = options.pop("guidance_scale")
        options.setdefault("negative_prompt", ["", ""])
    latents = pipe(
        prompt=list(PROMPTS), height=2 * height, width=2 * width, num_inference_steps=steps, generator=generators,
        output_type="latent", **options,
    ).images  # fmt: skip
    if family in ("sd3", "z_image"):
        return latents
    if family.startswith("flux2"):
        patches = pipe._patchify_latents(latents)
        std = torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps)
        return pipe._unpatchify_latents((patches - pipe.vae.bn.running_mean[:, None, None]) / std[:, None, None])
    return pipe._unpack_latents(latents, 2 * height, 2 * width, pipe.vae_scale_factor).view(2, -1, height, width)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("flux-dev", {}),
        ("flux-schnell", {}),
        ("sd3", {"negative": ["blurry", "a city"]}),
        ("sd3", {"guidance_scale": 1.0}),
        ("flux2", {}),
        ("flux2", {"guidance_scale": 1.0}),
        ("flux2-distilled", {}),
        ("z_image", {"negative": ["blurry", "a city"]}),
        ("z_image", {"guidance_scale": 0.5}),
        ("z_image", {"guidance_scale": 0.0}),
        ("qwen_image", {"negative": ["blurry", "a city"]}),
        ("qwen_image", {"guidance_scale": 1.0}),
    ],
    ids=str,
)
def test_whole_equals_the_pipeline(folders, pipelines, family, options):
    """Also beyond the size of a view; mu of FLUX.1 [dev] is that of the whole picture's tokens."""
    negative = options.get("negative")
    options = {name: value for name, value in options.items() if name != "negative"}
    expected = pipeline_latents(
        pipelines(family), family, 16, 32, 4, **options, **({"negative_prompt": list(negative)} if negative else {})
    )
    made = sampler(folders[family], length=SETTINGS[family]["length"], layout="whole")
    assert error(sample(made, family, 16, 32, 4, negative_prompts=negative, **options), expected) <= 1e-5


def test_stable_diffusion_3_runs_without_t5(folders, tmp_path):
    folder = tmp_path / "tiny-sd3"
    shutil.copytree(folders["sd3"], folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    made = sampler(folder, length=24, layout="whole")
    assert error(sample(made, "sd3", 16, 16, 3), pipeline_latents(pipe, "sd3", 16, 16, 3)) <= 1e-5
    assert made.backbone.tokenizers[0].model_max_length == 77
    assert made.cut_text("mountains " * 100) is not None


@pytest.mark.parametrize(("family", "merged"), combinations(FAMILIES, [0, 2, 4], one_in=3))
def test_mad_equals_a_plain_loop(folders, pipelines, family, merged):
    """MAD in all layers is the transformer on the canvas; without merged steps it is MultiDiffusion."""
    settings = {**SETTINGS[family], "steps": 4, "view": 16, "direct_steps": merged}
    expected = [
        flow_reference.sample(pipelines(family), prompt, seed, 16, 32, **settings)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    made = sampler(folders[family], length=settings["length"], size=16, stride=4, steps=merged)
    assert error(sample(made, family, 16, 32, 4), torch.cat(expected)) <= 1e-5


@pytest.mark.parametrize("family", ["flux-dev", "sd3", "flux2", "qwen_image"])
def test_a_fully_merged_step_runs_the_canvas_once(folders, family):
    made = sampler(folders[family], length=64, size=16, stride=4, steps=2)
    shapes, network = [], made.backbone.transformer
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["hidden_states"].shape)), with_kwargs=True
    )
    fast = sample(made, family, 16, 32, 4)
    paths, cells = (2, 16) if family == "flux-dev" else (4, 16)
    token = (lambda height, width: (height * width // 4, 16)) if family != "sd3" else (lambda h, w: (4, h, w))
    assert shapes == [(paths, *token(16, 32))] * 2 + [(5 * paths, *token(cells, cells))] * 2
    made.backbone.runs_canvas_once = False
    shapes.clear()
    general = sample(made, family, 16, 32, 4)
    hook.remove()
    assert shapes == [(5 * paths, *token(16, 16))] * 4
    assert error(fast, general) <= 1e-5


@pytest.mark.parametrize("family", ["flux2", "z_image", "qwen_image"])
def test_pixels_equal_those_of_the_pipeline(folders, pipelines, family):
    """Statistics of FLUX.2's VAE, one frame of Qwen-Image's video VAE, scaling and shift of Z-Image's."""
    options = {"height": 32, "width": 64, "num_inference_steps": 2}
    scale = {"true_cfg_scale" if family == "qwen_image" else "guidance_scale": 1.0}
    pipe = pipelines(family)
    call = {**options, **scale, "max_sequence_length": 24}
    expected = pipe(prompt="a city", generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    made = sampler(folders[family], length=24, layout="whole")
    latents = made.sample(["a city"], seeds=[3], guidance_scale=1.0, output="latent", **options)
    pixels = made.decode_pixels(latents)
    assert np.abs(pixels.permute(0, 2, 3, 1).numpy() - expected).max() <= 1e-4
    with torch.no_grad():
        mean = encoded(pipe, pixels * 2 - 1)
        ours = made.backbone.encode(pixels)
    assert error(ours, mean) <= 1e-5


def encoded(pipe, images):
    """Return latents of images, scaled as diffusers' image-to-image pipelines scale them."""
    config = pipe.vae.config
    if "z_dim" in config:
        mean = pipe.vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
        return (mean - torch.tensor(config.latents_mean)[:, None, None]) / torch.tensor(config.latents_std)[
            :, None, None
        ]
    if hasattr(pipe.vae, "bn"):
        return pipe._unpatchify_latents(pipe._encode_vae_image(images, None))
    return (pipe.vae.encode(images).latent_dist.mode() - config.shift_factor) * config.scaling_factor


def test_mu_of_flux2_is_that_of_diffusers():
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    from madgen.backbones.flux2 import empirical_mu

    for tokens in (64, 4096, 4300, 4301, 16384):
        for steps in (4, 50):
            assert empirical_mu(tokens, steps, {}) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


@pytest.mark.parametrize(("height", "width", "view"), [(20, 28, 16), (18, 30, 12), (16, 24, 16)])
def test_z_image_pads_to_multiples_of_32_tokens_as_its_pipeline_does(folders, pipelines, height, width, view):
    """Canvases of 140, 135 and 96 tokens, views of 64 and 36."""
    folder, run = folders["z_image"], ("z_image", height, width, 3)
    reference = pipeline_latents(pipelines("z_image"), *run)
    whole = sampler(folder, length=24, layout="whole")
    merged = sampler(folder, length=24, size=view, stride=2, steps=3)
    assert error(sample(whole, *run), reference) <= 1e-5
    assert error(sample(merged, *run), reference) <= 1e-5
    if (height * width // 4) % 32 == (view * view // 4) % 32 == 0:  # otherwise the canvas is padded like a view
        merged.backbone.runs_canvas_once = False
        assert error(sample(merged, *run), reference) <= 1e-5
