"""Settings of transformers that do not apply are refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_transformers import folder_of, latents, load, sampler, without_guidance

from madgen import PanoramaSampler, UserError
from madgen.hub.weights import ModelFiles

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"


def test_syncdiffusion_without_a_predicted_image_is_refused():
    with pytest.raises(UserError, match=r"UniPCMultistepScheduler does not expose.*example FlowMatchEulerDiscrete"):
        latents(load("flux", sync_weight=20.0, sync_network="random", scheduler="UniPCMultistepScheduler"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux", {"cross_attention": "always"}, "method.mad.cross_attention=always does not apply"),
        ("sd3", {"cross_attention": "always"}, "method.mad.cross_attention=always does not apply"),
        ("sd3", {"mad_blocks": ["single"]}, "'single' of this backbone has no attention layers; remove it"),
        ("flux", {"mad_blocks": ["down"]}, "'down' is neither early, middle, late, double, single nor a pattern"),
        ("flux", {"view_size": 15}, "method.views.size=15 must be a multiple of 2 latent cells"),
        ("flux", {"stride": 3}, "stride=3 must be a multiple of 2 latent cells"),
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


def test_offloading_of_unets_is_refused(tiny):
    with pytest.raises(UserError, match=r"backbone\.offload=model is not supported for UNets; set it to none"):
        PanoramaSampler.from_pretrained(str(tiny), overrides=["backbone.offload=model"])


@pytest.mark.parametrize("key", ["guidance_embeds", "use_layer3d_rope", "use_additional_t_cond"])
def test_other_transformers_of_qwen_image_are_refused(tmp_path, key):
    folder = shutil.copytree(folder_of("qwen_image"), tmp_path / "qwen", ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {key: True}), encoding="utf-8")
    with pytest.raises(UserError, match=f"a transformer with {key} is not supported"):
        PanoramaSampler.from_pretrained(str(folder), name="qwen_image")


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
