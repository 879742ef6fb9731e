"""`PanoramaSampler.from_pipe` samples with a loaded pipeline as it is, and leaves it as it was."""

import copy
import re

import numpy as np
import pytest
import torch
from test_diffusers_call import quiet, seeded

from madgen import PanoramaSampler, UserError

SIZE = {"height": 32, "width": 96, "num_inference_steps": 3, "guidance_scale": 4.0}
CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
GOLDEN = "tests/parity/golden"
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn"
LORA = {
    "sd": {f"unet.{ATTENTION}1.to_q": (16, 16), f"unet.{ATTENTION}2.to_k": (96, 16)},
    "sdxl": {f"unet.{ATTENTION}1.to_q": (16, 16), f"unet.{ATTENTION}2.to_k": (64, 16)},
}
TEXT = {"sd": 96, "sdxl": 24}
FAMILIES = ("sd", "sdxl")


@pytest.fixture(scope="session")
def folders(tiny, tiny_xl):
    return {"sd": tiny, "sdxl": tiny_xl}


@pytest.fixture
def load(folders):
    """Load the pipeline of a family by diffusers."""

    def load(name, **options):
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        if name == "sd":
            return quiet(StableDiffusionPipeline.from_pretrained(folders[name], safety_checker=None, **options))
        return quiet(StableDiffusionXLPipeline.from_pretrained(folders[name], add_watermarker=False, **options))

    return load


def latents(sampler, seed=1, **options):
    return sampler.sample(["a hill"], seeds=[seed], output="latent", **{**SIZE, **options})


def distance(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def modules(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [module for part in parts for module in part.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_samples_as_its_folder_and_stays_as_it_was(folders, load, name):
    pipe = load(name)
    before = pipe("a hill", generator=seeded(), **CALL).images
    attributes = [(module, dict(vars(module))) for module in modules(pipe)]
    gradients = [parameter.requires_grad for module in modules(pipe) for parameter in module.parameters()]
    borrowed = PanoramaSampler.from_pipe(pipe, mad_steps=2)
    loaded = PanoramaSampler.from_pretrained(folders[name], name=name, mad_steps=2)
    assert borrowed.backbone.spec == loaded.backbone.spec
    made = latents(borrowed)
    assert torch.equal(made, latents(loaded))
    assert np.array_equal(borrowed.decode(made), loaded.decode(made))
    assert borrowed.cut_text("a hill " * 30) == loaded.cut_text("a hill " * 30)
    for module, then in attributes:
        assert vars(module).keys() == then.keys()
        assert all(vars(module)[key] is value for key, value in then.items())
    assert gradients == [parameter.requires_grad for module in modules(pipe) for parameter in module.parameters()]
    assert np.array_equal(pipe("a hill", generator=seeded(), **CALL).images, before)


def test_a_consistency_model_samples_as_its_folder():
    from diffusers import LatentConsistencyModelPipeline
    from processes import ROOT

    folder, options = ROOT / GOLDEN / "tiny-lcm", {"height": 256, "width": 384, "num_inference_steps": 2}
    pipe = quiet(LatentConsistencyModelPipeline.from_pretrained(folder, safety_checker=None))
    method = {"stride": 16, "view_size": 32, "mad_steps": 1}
    borrowed = PanoramaSampler.from_pipe(pipe, **method)
    assert torch.equal(
        latents(borrowed, **options), latents(PanoramaSampler.from_pretrained(folder, **method), **options)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_that_diffusers_loaded_equals_one_of_madgen(folders, load, name, tmp_path):
    from safetensors.torch import save_file

    generator, tensors = seeded(0), {}
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (TEXT[name],) * 2}
    for layer, (inputs, outputs) in {**LORA[name], **text}.items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    pipe = load(name)
    borrowed = PanoramaSampler.from_pipe(pipe, mad_steps=2)
    plain = latents(borrowed)

    def fused(scale):
        loras = [{"weights": file, "scale": scale}]
        return latents(PanoramaSampler.from_pretrained(folders[name], name=name, mad_steps=2, loras=loras))

    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="a")  # after from_pipe
    assert distance(latents(borrowed), fused(1.0)) < 1e-4
    assert distance(latents(PanoramaSampler.from_pipe(pipe, mad_steps=2)), fused(1.0)) < 1e-4
    pipe.set_adapters(["a"], [0.3])
    assert distance(latents(borrowed), fused(0.3)) < 1e-4
    assert distance(fused(0.3), fused(1.0)) > 1e-3
    pipe.fuse_lora(lora_scale=1.0)
    assert distance(latents(PanoramaSampler.from_pipe(pipe, mad_steps=2)), fused(0.3)) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert distance(latents(PanoramaSampler.from_pipe(pipe, mad_steps=2)), plain) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_an_offloaded_pipeline_samples_the_same(folders, load, name):
    pipe = load(name)
    pipe.enable_model_cpu_offload(device="cpu")
    loaded = PanoramaSampler.from_pretrained(folders[name], name=name, mad_steps=2)
    borrowed = quiet(PanoramaSampler.from_pipe(pipe, mad_steps=2))
    for _ in range(2):
        assert torch.equal(latents(borrowed), latents(loaded))
    images = borrowed("a hill", generator=seeded(), height=32, width=96, **CALL).images
    expected = quiet(loaded)("a hill", generator=seeded(), height=32, width=96, **CALL).images
    assert np.array_equal(images, expected)
    assert not borrowed.backbone.encode_prompts(["a"], [""], 4.0).keys_values  # its hooks load the layers later


def test_a_pipeline_with_group_offloading_samples_the_same(tiny, load):
    """Offloading copies weights to addresses of another alignment, by which MKL selects kernels on some processors."""
    pipe = load("sd")
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    expected = latents(PanoramaSampler.from_pretrained(tiny, mad_steps=2))
    assert distance(latents(PanoramaSampler.from_pipe(pipe, mad_steps=2)), expected) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_a_quantised_unet_samples(load, name):
    """PyTorch's dynamic int8 layers are near the network's own, and are used: the result is not the same."""
    pipe = load(name)
    full = latents(PanoramaSampler.from_pipe(pipe, mad_steps=2))
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, dtype=torch.qint8)
    quantised = PanoramaSampler.from_pipe(pipe, mad_steps=2)
    assert 1e-4 < distance(latents(quantised), full) < 0.1
    whole = quiet(PanoramaSampler.from_pipe(pipe, layout="whole", mad_steps=0))
    reference = pipe("a hill", generator=seeded(), **CALL).images
    assert np.abs(whole("a hill", generator=seeded(), **CALL).images - reference).max() < 0.02


def freeu(pipe):
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)


def karras(pipe):
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)


def multi_vector_token(pipe):
    generator = seeded(9)
    vectors = torch.randn(3, pipe.text_encoder.config.hidden_size, generator=generator)
    pipe.load_textual_inversion(vectors, token="<hill>")


def sliced(pipe):
    pipe.enable_attention_slicing(1)


def fused_projections(pipe):
    pipe.fuse_qkv_projections()


def tiled_vae(pipe):
    pipe.vae.enable_tiling()


@pytest.mark.parametrize("setup", [freeu, karras, multi_vector_token, sliced, fused_projections, tiled_vae])
def test_what_is_set_up_in_a_pipeline_is_in_effect(load, setup):
    """With the whole canvas as one view, the sampler is the pipeline."""
    prompt, pipe = "a <hill> at noon", load("sd")
    plain = quiet(PanoramaSampler.from_pipe(load("sd"), layout="whole", mad_steps=0))
    setup(pipe)
    options = {"height": 64, "width": 96, **CALL}
    reference = pipe(prompt, generator=seeded(), **options).images
    sampler = quiet(PanoramaSampler.from_pipe(pipe, layout="whole", mad_steps=0))
    assert np.abs(sampler(prompt, generator=seeded(), **options).images - reference).max() < 1e-4
    if setup not in (sliced, fused_projections):  # these compute the same in another way
        assert np.abs(plain(prompt, generator=seeded(), **options).images - reference).max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_is_the_pipeline_s(folders, load, dtype):
    """In float16 the VAE is upcast while it decodes, as it overflows in that precision."""
    pipe = load("sdxl", torch_dtype=dtype)
    pipe.unet.requires_grad_(False)  # else PyTorch multiplies by other kernels, with other last bits
    borrowed = PanoramaSampler.from_pipe(pipe, mad_steps=2)
    name = str(dtype).removeprefix("torch.")
    loaded = PanoramaSampler.from_pretrained(folders["sdxl"], name="sdxl", dtype=name, mad_steps=2)
    made = latents(borrowed)
    assert borrowed.dtype == dtype
    assert torch.equal(made, latents(loaded))
    assert np.array_equal(borrowed.decode(made), loaded.decode(made))
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {dtype}


def test_dropout_is_off_while_the_sampler_works(load, tiny):
    pipe = load("sd")
    pipe.unet.train()
    sampler = PanoramaSampler.from_pipe(pipe, mad_steps=2)
    seen = []
    sampler.sample(["a"], seeds=[1], on_step=lambda step: seen.append(pipe.unet.training), **SIZE)
    assert seen == [False] * 3
    assert pipe.unet.training


def test_pipeline_and_samplers_may_be_called_from_a_step(load):
    pipe = load("sd")
    first, second = (quiet(PanoramaSampler.from_pipe(pipe, mad_steps=steps)) for steps in (2, 0))
    alone = latents(first), latents(second), pipe("a hill", generator=seeded(), **CALL).images
    inner = []

    def step(index):
        inner.append((latents(second), pipe("a hill", generator=seeded(), **CALL).images))

    assert torch.equal(latents(first, on_step=step), alone[0])
    for other, images in inner:
        assert torch.equal(other, alone[1])
        assert np.abs(images - alone[2]).max() < 1e-5
    with pytest.raises(ZeroDivisionError):
        latents(first, on_step=lambda index: 1 / 0)
    assert np.array_equal(pipe("a hill", generator=seeded(), **CALL).images, alone[2])


def test_a_copy_of_the_sampler_has_a_copy_of_the_pipeline(load):
    sampler = PanoramaSampler.from_pipe(load("sd"), mad_steps=2)
    copied = copy.deepcopy(sampler)
    expected = latents(sampler)
    with torch.no_grad():
        for parameter in sampler.backbone.unet.parameters():
            parameter.zero_()
    assert torch.equal(latents(copied), expected)


@pytest.mark.parametrize("which", ["object", "class", "name", "override"])
def test_schedulers_are_objects_classes_or_names(tiny, which):
    from diffusers import EulerAncestralDiscreteScheduler as Euler
    from diffusers import StableDiffusionPipeline

    config = StableDiffusionPipeline.load_config(tiny)
    assert config["scheduler"][1] == "DDIMScheduler"
    own = PanoramaSampler.from_pretrained(tiny, mad_steps=1)
    given = {
        "object": {"scheduler": Euler.from_config(own.scheduler.config)},
        "class": {"scheduler": Euler},
        "name": {"scheduler": "EulerAncestralDiscreteScheduler"},
        "override": {"overrides": ["sampling.scheduler=EulerAncestralDiscreteScheduler"]},
    }[which]
    expected = PanoramaSampler.from_pretrained(tiny, mad_steps=1)
    expected.scheduler = Euler
    made = latents(PanoramaSampler.from_pretrained(tiny, mad_steps=1, **given))
    assert torch.equal(made, latents(expected))
    assert not torch.equal(made, latents(own))


def test_options_of_a_scheduler_object_are_in_effect(tiny):
    from diffusers import EulerDiscreteScheduler

    own = PanoramaSampler.from_pretrained(tiny, mad_steps=0, layout="whole")
    made = [
        latents(
            PanoramaSampler.from_pretrained(
                tiny, mad_steps=0, layout="whole",
                scheduler=EulerDiscreteScheduler.from_config(own.scheduler.config, use_karras_sigmas=karras),
            )
        )
        for karras in (False, True)
    ]  # fmt: skip
    assert not torch.equal(*made)


def ip_adapter(pipe):
    pipe.unet.encoder_hid_proj = torch.nn.Linear(1, 1)


def other_processor(pipe):
    from diffusers.models.attention_processor import AttnAddedKVProcessor

    pipe.unet.set_attn_processor(AttnAddedKVProcessor())


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet)


def compiled_in_place(pipe):
    pipe.vae.compile()


def safety_checker(pipe):
    pipe.safety_checker = torch.nn.Linear(1, 1)


def watermark(pipe):
    pipe.watermark = object()


def double(pipe):
    pipe.unet.double()


def no_text_encoder(pipe):
    pipe.text_encoder = None


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (ip_adapter, "IP-Adapters are not supported; call pipe.unload_ip_adapter() first"),
        (other_processor, "the attention processor AttnAddedKVProcessor of"),
        (compiled, "the compiled unet is not supported"),
        (compiled_in_place, "the compiled vae is not supported"),
        (safety_checker, "set pipe.safety_checker = None"),
        (watermark, "set pipe.watermark = None"),
        (double, "unet is in torch.float64; use float32, bfloat16 or float16"),
        (no_text_encoder, "StableDiffusionPipeline has no text_encoder"),
    ],
)
def test_what_a_pipeline_cannot_have_is_refused_by_name(load, setup, message):
    pipe = load("sd")
    setup(pipe)
    before = [dict(vars(module)) for module in modules(pipe)]
    with pytest.raises(UserError, match=re.escape(message)):
        PanoramaSampler.from_pipe(pipe)
    assert before == [dict(vars(module)) for module in modules(pipe)]


def test_other_pipelines_are_refused_by_name(load, tiny):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    pipe = load("sd")
    with pytest.raises(UserError, match=r"Img2ImgPipeline is not supported; convert it by diffusers.Sta"):
        PanoramaSampler.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    for other in (tiny, pipe.unet, None):
        with pytest.raises(UserError, match="pipe must be a loaded diffusers pipeline, got "):
            PanoramaSampler.from_pipe(other)

    class Mine(StableDiffusionPipeline):
        pass

    assert torch.equal(
        latents(PanoramaSampler.from_pipe(Mine(**pipe.components, requires_safety_checker=False))),
        latents(PanoramaSampler.from_pipe(pipe)),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.merge.operater=swap"], "unknown key 'method.merge.operater'; did you mean 'method.merge.operator'?"),
        (["prompts.limit=2"], "overrides may set keys of backbone, method, sampling, got prompts.limit"),
        (["method.mad.steps=-1"], "method.mad.steps must be >= 0, got -1"),
        (["sampling.batch_size=4"], "sampling.batch_size has no effect in Python"),
        (["method"], "an override must be key=value, got 'method'"),
        ("method.mad.steps=1", "overrides must be a list"),
        (["sampling.height=abc"], "sampling.height"),
    ],
)
def test_invalid_overrides_have_the_message_of_the_command_line(tiny, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PanoramaSampler.from_pretrained(tiny, overrides=overrides)


def test_overrides_are_those_of_the_command_line(tiny, load):
    from madgen import load_job

    words = ["method.merge.operator=swap", "method.mad.steps=1", "sampling.num_inference_steps=3",
             "sampling.guidance_scale=4", "sampling.width=96"]  # fmt: skip
    sampler = PanoramaSampler.from_pretrained(tiny, mad_steps=9, overrides=words)
    job = load_job([], [f"backbone.pretrained={tiny}", *words, "sampling.height=32"])
    expected = PanoramaSampler.from_job(job)
    assert (sampler.method, sampler.params) == (expected.method, expected.params)
    made = sampler.sample(["a hill"], height=32, width=96, seeds=[1], output="latent")
    assert torch.equal(made, expected.sample(["a hill"], height=32, width=96, seeds=[1], output="latent"))
    assert sampler.default_size == expected.default_size == (32, 96)
    borrowed = PanoramaSampler.from_pipe(load("sd"), overrides=words)
    assert torch.equal(borrowed.sample(["a hill"], height=32, width=96, seeds=[1], output="latent"), made)
    with pytest.raises(UserError, match=r"backbone\.dtype cannot be set here"):
        PanoramaSampler.from_pipe(load("sd"), overrides=["backbone.dtype=float16"])
    with pytest.raises(TypeError, match="unexpected argument 'mad_step'"):
        PanoramaSampler.from_pipe(load("sd"), mad_step=3)
