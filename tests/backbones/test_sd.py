import functools
import inspect
import json

import pytest
import torch

import madgen.sampling.noise
from madgen import PanoramaSampler, UserError, load_job
from madgen.backbones import backbone_module
from madgen.backbones._unet import UNetBackbone
from madgen.diffusion.attention import Merging
from madgen.hub.weights import ModelFiles

SIZE = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "output": "latent"}


def sampler(tiny, **method):
    return PanoramaSampler.from_pretrained(str(tiny), dtype="float32", **method)


@pytest.fixture(scope="module")
def pipeline(tiny):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)


def test_describe_reads_shapes_from_config_files(tiny):
    spec = backbone_module("sd").describe(ModelFiles(str(tiny)))
    assert (spec.channels, spec.factor, spec.view_size, spec.coarsest) == (4, 4, 8, 2)
    assert spec.guidance == "cfg"


def test_whole_layout_is_the_plain_pipeline_latents_and_pictures(tiny, pipeline):
    ours = sampler(tiny, layout="whole", mad_steps=0)
    generator = torch.Generator().manual_seed(5)
    options = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "generator": generator}
    reference = pipeline("a hill", negative_prompt="fog", output_type="np", **options).images[0]
    image = ours.sample(["a hill"], negative_prompts=["fog"], seeds=[5], **{**SIZE, "output": "image"})[0]
    assert image.shape == (32, 64, 3)
    assert abs(image.astype(int) - (reference * 255).round().astype(int)).max() <= 1


def test_mad_with_no_steps_is_multidiffusion_for_any_blocks_and_differs_from_mad(tiny):
    run = {"seeds": [1], **SIZE}
    plain = sampler(tiny, mad_steps=0).sample(["a hill"], **run)
    assert torch.equal(plain, sampler(tiny, mad_steps=0, mad_blocks=["mid"]).sample(["a hill"], **run))
    assert not torch.allclose(plain, sampler(tiny, mad_steps=3).sample(["a hill"], **run), atol=1e-3)


def test_mad_on_a_canvas_of_one_view_changes_nothing(tiny):
    run = {"seeds": [1], **SIZE, "width": 32}
    merged, plain = (sampler(tiny, mad_steps=steps).sample(["a hill"], **run) for steps in (3, 0))
    torch.testing.assert_close(merged, plain)


def test_a_prompt_does_not_depend_on_its_neighbours_in_the_batch(tiny):
    mad = sampler(tiny, mad_steps=2)
    prompts, negatives, seeds = ["a hill", "the sea at night", "dunes"], ["", "fog", "sun"], [3, 4, 5]
    together = mad.sample(prompts, negative_prompts=negatives, seeds=seeds, **SIZE)
    for index in range(3):
        alone = mad.sample([prompts[index]], negative_prompts=[negatives[index]], seeds=[seeds[index]], **SIZE)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_ancestral_noise_depends_on_the_prompt_only(tiny):
    mad = sampler(tiny, mad_steps=1, scheduler="EulerAncestralDiscreteScheduler")
    together = mad.sample(["a hill", "the sea"], seeds=[3, 4], **SIZE)
    alone = mad.sample(["the sea"], seeds=[4], **SIZE)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, mad.sample(["the sea"], seeds=[5], **SIZE))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers_on_the_canvas_equal_the_pipeline(tiny, pipeline, name):
    import diffusers

    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    other = type(pipeline)(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    options = {"height": 32, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    reference = other("a hill", generator=torch.Generator().manual_seed(2), **options).images
    ours = sampler(tiny, layout="whole", mad_steps=0, scheduler=name)
    latents = ours.sample(["a hill"], seeds=[2], **{**SIZE, "num_inference_steps": 4})
    assert float((latents - reference).norm() / reference.norm()) <= 1e-4


@pytest.fixture
def merging_layers(monkeypatch):
    """Every merge that a layer really does, as (step, layer)."""
    from madgen.backbones._unet import UNetBackbone
    from madgen.diffusion import attention

    done, current = [], {"step": 0, "layer": ""}
    call, merge_cells = attention.JointAttention.__call__, attention.merge_cells
    predict = UNetBackbone.predict_noise

    @functools.wraps(call)  # diffusers passes the arguments of the signature
    def counting_call(self, *arguments, **options):
        current["layer"] = self.name
        return call(self, *arguments, **options)

    def counting_merge(*arguments):
        done.append((current["step"], current["layer"]))
        return merge_cells(*arguments)

    def counting_predict(self, views, timestep, conditioning, joint, *arguments):
        current["step"] = joint.step
        return predict(self, views, timestep, conditioning, joint, *arguments)

    monkeypatch.setattr(attention.JointAttention, "__call__", counting_call)
    monkeypatch.setattr(attention, "merge_cells", counting_merge)
    monkeypatch.setattr(UNetBackbone, "predict_noise", counting_predict)
    return done


@pytest.mark.parametrize(
    ("blocks", "starts", "count"),
    [
        (["down"], ("down_blocks",), 4),
        (["mid"], ("mid_block",), 2),
        (["up"], ("up_blocks",), 8),
        (["down", "mid"], ("down_blocks", "mid_block"), 6),
        (["down", "mid", "up"], ("down_blocks", "mid_block", "up_blocks"), 14),
        (["up_blocks.1.*attn1*"], ("up_blocks.1",), 2),
    ],
)
def test_blocks_select_merged_layers_and_steps_select_when(tiny, merging_layers, blocks, starts, count):
    """Hooks in the layers see what they do, not how they are configured."""
    sampler(tiny, mad_steps=2, mad_blocks=blocks).sample(["a hill"], seeds=[1], **SIZE)
    assert len(merging_layers) == len(set(merging_layers))
    for step in range(SIZE["num_inference_steps"]):
        layers = [layer for at, layer in merging_layers if at == step]
        assert len(layers) == (count if step < 2 else 0)
        assert all(layer.startswith(starts) for layer in layers)


def test_cross_attention_always_merges_cross_attention_in_every_step(tiny, merging_layers):
    mad = sampler(tiny, mad_steps=1, mad_blocks=["mid"], cross_attention="always")
    mad.sample(["a hill"], seeds=[1], **SIZE)
    assert [step for step, layer in merging_layers if ".attn1." in layer] == [0]
    assert [step for step, layer in merging_layers if ".attn2." in layer] == [0, 1, 2]


def test_different_blocks_give_different_images(tiny):
    """The settings of the paper's Fig. 3."""
    settings = (["down"], ["mid"], ["up"], ["down", "mid"], ["mid", "up"], ["down", "up"], ["down", "mid", "up"])
    samplers = [sampler(tiny, mad_steps=3, mad_blocks=blocks) for blocks in settings]
    pictures = [mad.sample(["a hill"], seeds=[1], **SIZE) for mad in samplers]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert float((one - other).norm() / other.norm()) > 1e-4


def test_a_scheduler_of_second_order_merges_in_both_halves_of_a_step(tiny, merging_layers):
    mad = sampler(tiny, mad_steps=1, mad_blocks=["mid"], scheduler="HeunDiscreteScheduler")
    mad.sample(["a hill"], seeds=[1], **SIZE)
    assert [step for step, layer in merging_layers if ".attn1." in layer] == [0, 0]


def test_cross_attention_modes():
    scheduled, always = Merging(2, ("mid",), "scheduled"), Merging(2, ("mid",), "always")
    layers = ("mid_block.attentions.0.transformer_blocks.0.attn1.processor", "mid_block.x.attn2.processor")
    steps = [(step, UNetBackbone.crosses(layer)) for layer in layers for step in (1, 2)]
    assert [scheduled.applies(*step) for step in steps] == [True, False, True, False]
    assert [always.applies(*step) for step in steps] == [True, False, True, True]


def test_keys_and_values_of_the_prompt_are_projected_once_a_batch(tiny):
    mad = sampler(tiny, mad_steps=1)
    calls = []
    for name, module in mad.backbone.unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *_: calls.append(1))
    mad.sample(["a hill"], seeds=[1], **SIZE)
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 2]}, "non-empty lists of one length"),
        ({"prompts": []}, "non-empty lists of one length"),
        ({"height": 30}, "height=30 px cannot be covered .*; the smallest is 32 px"),
        ({"width": 60}, "the nearest are 56 and 64 px"),
        ({"output": "tensor"}, "output must be"),
        ({"regions": []}, "regions must have a list for each of 1 prompt, got 0"),
        ({"guidance_scale": 1.0, "negative_prompts": ["fog"]}, "no effect"),
        ({"loop": True, "width": 60}, "cannot be covered by a loop of views of 32 px that are 8 px apart"),
    ],
)
def test_invalid_arguments_are_refused(tiny, change, message):
    arguments = {"prompts": ["a hill"], "seeds": [1], **SIZE, **change}
    with pytest.raises(UserError, match=message):
        sampler(tiny).sample(arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"mad_steps": -1}, "steps must be >= 0, got -1"),
        ({"mad_blocks": []}, "blocks is empty"),
        ({"cross_attention": "never"}, "cross_attention must be one of scheduled, always"),
        ({"mad_blocks": ["middle"]}, "'middle' is neither down, mid, up nor a pattern"),
    ],
)
def test_methods_that_jobs_refuse_are_refused(tiny, method, message):
    with pytest.raises(UserError, match=message):
        sampler(tiny, **method)


def test_defaults_are_those_of_a_job(tiny):
    """A sampler of nothing but a folder is the sampler of an empty job."""
    job = load_job([], [f"backbone.pretrained={tiny}"])
    bare, asked = PanoramaSampler.from_pretrained(str(tiny)), PanoramaSampler.from_job(job)
    assert bare.method == asked.method
    assert vars(bare.geometry) == vars(asked.geometry)
    assert bare.params == asked.params
    defaults = inspect.signature(PanoramaSampler.sample).parameters
    for name in ("num_inference_steps", "guidance_scale", "guidance_steps", "loop", "decode"):
        assert defaults[name].default is None  # that of `params`


def test_sizes_suggested_by_an_error_are_accepted(tiny):
    mad = sampler(tiny)
    for width in (56, 64):
        assert mad.geometry.build(32, width)


def test_a_model_of_another_kind_is_refused(tiny, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is a FluxPipeline"):
        backbone_module("sd").describe(ModelFiles(str(tmp_path)))


def test_only_safetensors_weights_are_read(tiny, tmp_path):
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load"):
        sampler(folder)


@pytest.mark.parametrize("layout", ["overlapping", "shifted"])
@pytest.mark.parametrize("loop", [True, False])
def test_rolled_noise_gives_a_rolled_loop(tiny, monkeypatch, layout, loop):
    """With noise turned by some columns, a looped panorama is turned by as many; without a loop it is another."""
    mad, roll = sampler(tiny, layout=layout, mad_steps=2), 8
    latents = mad.sample(["a hill"], seeds=[1], loop=loop, **SIZE)
    module = madgen.sampling.noise
    noise = module.initial_noise
    monkeypatch.setattr(module, "initial_noise", lambda *arguments: noise(*arguments).roll(roll, -1))
    turned = mad.sample(["a hill"], seeds=[1], loop=loop, **SIZE)
    assert torch.allclose(latents.roll(roll, -1), turned, atol=1e-4) == loop


def test_a_looped_decoding_wraps(tiny):
    """Decoding a turned panorama is turning the decoded one: nearly so with wrapping, far from it without."""
    backbone = sampler(tiny).backbone
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    errors = {}
    for wrap in (0, 16):
        turned, plain = backbone.decode(latents.roll(4, -1), wrap), backbone.decode(latents, wrap)
        assert plain.shape == (1, 3, 32, 64)
        errors[wrap] = float((turned - plain.roll(16, -1)).abs().max())
    assert errors[16] < 0.2 * errors[0]


def test_shifted_views_take_a_third_of_the_evaluations(tiny):
    counts = {}
    for layout in ("overlapping", "shifted"):
        built = sampler(tiny, layout=layout).geometry.build(32, 96)
        counts[layout] = sum(built.at(step).count for step in range(8))
    assert counts == {"overlapping": 8 * 9, "shifted": 2 * 3 + 6 * 4}


def test_bfloat16_runs_and_is_close(tiny):
    half = PanoramaSampler.from_pretrained(str(tiny), dtype="bfloat16", mad_steps=2)
    latents = half.sample(["a hill"], seeds=[1], **SIZE)
    full = sampler(tiny, mad_steps=2).sample(["a hill"], seeds=[1], **SIZE)
    assert latents.dtype == torch.float32
    assert 0 < float((latents - full).norm() / full.norm()) < 0.1
