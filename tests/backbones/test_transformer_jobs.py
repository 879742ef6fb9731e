"""Jobs with transformers: presets, costs, text encoders, processes and resume points."""

import json
from pathlib import Path

import pytest
from tiny_transformers import FAMILIES, folder_of, latents, sampler, without_guidance

from madgen.config.loader import load_job
from madgen.demo import BACKBONES

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"


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
