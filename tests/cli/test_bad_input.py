"""Invalid input: exit 2, one line, no traceback, nothing written."""

import gzip
import json
import os
import shutil

import pytest


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.source=empty.txt"], "empty.txt contains no prompts"),
        (["prompts.source=missing.txt"], "prompts.source=missing.txt does not exist"),
        (["prompts.source=none*.txt"], "none*.txt does not exist, and matches no file"),
        (["prompts.source=hf://nobody/nothing"], "hf://nobody/nothing: cannot load split 'train'"),
        (
            ["backbone.name=flux", "backbone.pretrained=demo-dit", "backbone.controlnet.weights=x"],
            "backbone.controlnet is not supported for backbone.name=flux; use sd or sdxl",
        ),
        (
            ["backbone.name=flux", "backbone.pretrained=demo-dit", "backbone.ip_adapter.weights=x"],
            "backbone.ip_adapter is not supported for backbone.name=flux; use sd or sdxl",
        ),
        (["backbone.variant=fp16"], "has no weights of this variant; set it to null"),
        (["method.views.stride=3"], "method.views.stride=3 must be a multiple of 2 latent cells for method.mad"),
        (["prompts.regions=[{mask: [0, 0, 8, 8], promt: a}]"], "unknown field 'promt'; did you mean 'prompt'?"),
        (["prompts.split=test"], "prompts.split=test needs a Hugging Face dataset"),
        (["prompts.columns.prompt=caption"], "prompts.columns does not apply to prompts.txt"),
        (["sampling.size=64"], "unknown key 'sampling.size'; set sampling.height and sampling.width"),
        (["cfg=3"], "unknown key 'cfg'; set sampling.guidance_scale"),
        (["sampling.widht=64"], "unknown key 'sampling.widht'; did you mean 'sampling.width'?"),
        (
            ["sampling.width=65"],
            "width=65 px cannot be covered by views of 32 px that are 8 px apart; the nearest are 64 and 72 px",
        ),
        (["sampling.width=60"], "width=60 px cannot be covered by views of 32 px that are 8 px apart"),
        (["sampling.width=16"], "the smallest is 32 px"),
        (["method.views.stride=9"], "need 0 < stride <= size, got stride 9 and size 8 latent cells"),
        (
            ["method.views.stride=1"],
            "method.views.stride=1 must be a multiple of 2 latent cells for method.mad (the lowest resolution of the",
        ),
        (["method.views.layout=whole", "method.views.size=8"], "have no effect with layout=whole"),
        (["backbone.pretrained=no-such-model"], "is neither a folder, nor 'demo', nor 'demo-dit', nor a Hub id"),
        (["backbone.pretrained=nobody/no-such-model"], "nobody/no-such-model"),
        (["backbone.pretrained=."], "not a diffusers pipeline"),
        (["backbone.name=dalle"], "backbone.name must be one of flux, "),
        (["sampling.scheduler=MagicScheduler"], "'MagicScheduler' is not a diffusers scheduler"),
        (["sampling.guidance_scale=1", "prompts.negative_prompt=fog"], "a negative prompt has no effect"),
        (["method.mad.blocks=[middle]"], "'middle' is neither down, mid, up nor a pattern"),
        (["trainer.accelerator=gpu"], "trainer:"),
        (["output.dir=foreign"], "output.dir=foreign is not empty and holds no madgen dataset"),
        (["output.dir=job.yaml"], "output.dir=job.yaml: job.yaml is a file"),
        (["output.dir=job.yaml/below"], "output.dir=job.yaml/below: job.yaml is a file"),
        (["prompts.seed=-5"], "prompts.seed must be in 0..2^64-1, got -5"),
        (["method.mad.blocks=up"], "method.mad.blocks is a list: write method.mad.blocks=[...]"),
        (["method.sync.weight=-1"], "method.sync.weight must be a finite number >= 0, got -1"),
        (["method.sync.weight=20", "method.sync.steps=0"], "method.sync.steps=0 leaves method.sync.weight=20 without"),
        (["prompts.regions=[{mask: [0, 0, 80, 8], prompt: a hut}]"], "need 0 <= 0 < 80 <= 64 px"),
        (["prompts.regions=[{mask: none.png, prompt: a hut}]"], "mask file none.png does not exist"),
        (["output.dir=other"], "(sampling.guidance_scale: 9.0 there, 2.0 here; prompts.limit: 1 there, null here"),
        (["sampling.num_inference_steps=2000"], "num_inference_steps"),
        (["sampling.num_inference_steps=1000000000"], "sampling.num_inference_steps must be in 1..10000"),
        (["sampling.width=8000000000"], "exceed the largest supported panorama, 67108864 px (2^26)"),
        (
            ["output.format=webp", "sampling.width=16416"],
            "webp supports at most 16383 px a side; use another",
        ),
        (["output.format=jpg", "sampling.width=65600"], "jpg supports at most 65500 px a side"),
        (["sampling.batch_size=0"], "sampling.batch_size must be an integer > 0 or auto, got 0"),
        (["sampling.batch_size=many"], "sampling.batch_size must be an integer > 0 or auto, got 'many'"),
        (["output.format=gif"], "output.format must be one of png, jpg, webp, got 'gif'"),
        (["output.quality=0"], "output.quality must be in 1..100, got 0"),
        (["output.samples_per_shard=0"], "output.samples_per_shard must be > 0, got 0"),
        (["output.resume=always"], "output.resume must be one of if_same, extend, never"),
        (["retry=all"], "retry must be quarantined or null, got 'all'"),
        (["quarantine.max_share=2"], "quarantine.max_share must be in 0..1, got 2"),
        (["safety.checker=nowhere"], "nowhere"),
        (["safety.action=drop"], "safety.action=drop has no effect without a checker"),
        (["name=../escape"], "name must match [A-Za-z0-9_-]{1,96}, got '../escape'"),
        (["name=a/b"], "name must match"),
        (
            ["prompts.source=hostile.jsonl"],
            "id must match [A-Za-z0-9_-]{1,96} (a WebDataset key contains no dots), got '../../x'",
        ),
        (["prompts.source=dots.jsonl"], "got 'a.b'"),
        (["prompts.source=latin.txt"], "latin.txt:2 is not UTF-8 (byte 10)"),
        (["prompts.source=twice.txt"], "set prompts.on_duplicate=skip to keep the first one, or to rename"),
        (["prompts.source=cut.txt.gz"], "is not a complete gzip file"),
        (["prompts.source=nothing/*.txt"], "nothing/*.txt"),
        (["prompts.source=foreign"], "is a directory"),
        (["prompts.source=job.yaml"], "must end in"),
        (["prompts.limit=0"], "prompts.limit must be > 0 prompts or null, got 0"),
        (["prompts.samples_per_prompt=0"], "prompts.samples_per_prompt must be in 1..10000, got 0"),
        (["prompts.source=text.csv"], "has no column 'prompt'"),
        (["backbone.dtype=float8"], "backbone.dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
        (["backbone.pretrained=weights.ckpt"], "is a pickle, which can run code when loaded"),
        (["backbone.loras={}"], "backbone.loras is a list"),
        (["[=1"], "an override must be key=value, got '[=1'"),
        (["backbone=sd"], "backbone is a section: set its keys, such as backbone.name"),
        (
            ["method.views.layout=spiral"],
            "method.views.layout must be one of overlapping, shifted, whole, got 'spiral'",
        ),
        (["method.mad.steps=-1"], "method.mad.steps must be >= 0, got -1"),
        (["sampling.decode=slow"], "sampling.decode must be one of auto, whole, tiled, got 'slow'"),
        (["sampling.guidance_scale=.inf"], "sampling.guidance_scale must be a finite number >= 0, got inf"),
        (["trainer.devices=0"], "trainer.devices must be an integer > 0 or auto, got 0"),
        (
            ["backbone.gpu_memory=4GB"],
            "backbone.gpu_memory must be a number, got '4GB'; write 4 without a unit (Memory of the GPU in GiB, > 0",
        ),
        (["sampling.width="], "sampling.width must have a value, got null; remove it to use the default"),
        (["output.dir=/proc/x"], "output.dir=/proc/x cannot be written (No such file or directory); choose another"),
        (["monitor.wandb.mode=maybe"], "monitor.wandb.mode must be one of online, offline, disabled, or null"),
    ],
)
def test_generate_refuses_invalid_input_in_one_line(madgen_here, job_file, tmp_path, overrides, message):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/photo.png").write_text("mine", encoding="utf-8")
    (tmp_path / "hostile.jsonl").write_text('{"prompt": "a", "id": "../../x"}', encoding="utf-8")
    (tmp_path / "dots.jsonl").write_text('{"prompt": "a", "id": "a.b"}', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"a hill\ncaf\xe9\n")
    (tmp_path / "twice.txt").write_text("a hill\na lake\na hill\n", encoding="utf-8")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a hill\n" * 999)[:-9])
    (tmp_path / "text.csv").write_text("text\na hill\n", encoding="utf-8")
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    if "output.dir=other" in overrides:
        assert madgen_here("generate", job_file, "output.dir=other", "sampling.guidance_scale=9", "prompts.limit=1",
                           "prompts.samples_per_prompt=1").code == 0  # fmt: skip
    before = listing(tmp_path)
    result = madgen_here("generate", job_file, *overrides)
    assert result.code == 2, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert listing(tmp_path) == before


def test_unwritable_output_is_refused_before_models_are_loaded(refused, job_file, monkeypatch):
    monkeypatch.setattr("madgen.generation.module.load", lambda *_: pytest.fail("loads the models"))
    assert "output.dir=/proc/x cannot be written" in refused("generate", job_file, "output.dir=/proc/x")


def test_refusing_process_exits_with_2_after_one_line(madgen, job_file):
    result = madgen("generate", job_file, "prompts.source=missing.txt")
    assert (result.code, len(result.err.strip().splitlines()), result.out) == (2, 1, "")


def test_resume_never_refuses_a_dataset(madgen_here, job_file):
    assert madgen_here("generate", job_file, "prompts.limit=1").code == 0
    result = madgen_here("generate", job_file, "prompts.limit=1", "output.resume=never")
    assert (result.code, "output.resume=never" in result.err) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x=1"],
        ["generate", "no.yaml"],
        ["plan", "no.yaml"],
        ["plan", "prompts.txt"],
        ["paint"],
        ["preview", "out", "--limit", "0"],
        ["preview", "out", "--megabytes", "-1"],
        ["regenerate", "out", "key"],
        ["filter", "out"],
        ["filter", "out", "--where", "seam < 2", "-o", "new"],
        ["filter", "out", "--where", "seam <", "-o", "new"],
    ],
)
def test_missing_job_unknown_command_and_unknown_option_are_refused(madgen_here, arguments):
    result = madgen_here(*arguments)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1, result.err


@pytest.mark.parametrize("command", ["status", "verify", "preview", "index"])
def test_directory_without_a_dataset_is_refused(madgen_here, tmp_path, command):
    result = madgen_here(command, tmp_path)
    assert result.code == 2
    assert "holds no madgen dataset" in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["", "-o", "x.png"], ["a hill", "-o", "x.gif"], ["a hill", "-o", "no/x.png"], ["a hill", "sampling.width=5"]],
)
def test_sample_refuses_invalid_input_in_one_line(madgen_here, tmp_path, arguments):
    result = madgen_here("sample", *arguments)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert listing(tmp_path) == []


def test_plan_writes_nothing_and_counts(madgen_here, job_file, tmp_path):
    before = listing(tmp_path)
    plan = json.loads(madgen_here("plan", job_file, "--json").out)
    assert (plan["prompts"], plan["samples"], plan["shards"]) == (5, 10, 4)
    assert plan["sizes"] == [{"height": 32, "width": 64, "samples": 10, "views": 5}]
    assert plan["view_evaluations"] == 10 * 5 * 2 * 2  # samples x views x steps x guidance passes
    text = madgen_here("plan", job_file).out
    assert "10 panoramas in 4 shards" in text
    assert listing(tmp_path) == before


def test_plan_refuses_unknown_layers_without_loading_weights(madgen_here, job_file, tiny, tmp_path):
    """Patterns are held against the config files, as a login node without the weights has them."""
    configs = tmp_path / "configs"
    shutil.copytree(tiny, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = ("plan", job_file, f"backbone.pretrained={configs}")
    assert madgen_here(*plan, "method.mad.blocks=[mid, 'up_blocks.*.attn1.*']").code == 0
    result = madgen_here(*plan, "method.mad.blocks=[mid, 'up_blocks.*.attn3.*']")
    assert (result.code, result.out) == (2, "")
    assert "'up_blocks.*.attn3.*' is neither down, mid, up nor a pattern of a layer such as" in result.err


def test_the_next_number_of_steps_that_a_scheduler_has_is_named(madgen_here, job_file):
    plan = ("plan", job_file, "sampling.scheduler=PNDMScheduler")
    result = madgen_here(*plan, "sampling.num_inference_steps=2")
    assert result.code == 2
    assert "num_inference_steps=2 is not possible with PNDMScheduler; the next possible number is 4" in result.err
    assert madgen_here(*plan, "sampling.num_inference_steps=4").code == 0


@pytest.mark.parametrize("damage", ["{", "[]", '{"shard": "job-000000"}'])
def test_damaged_sidecar_error_names_file_and_fix(madgen_here, job_file, tmp_path, damage):
    assert madgen_here("generate", job_file, "prompts.limit=1").code == 0
    (tmp_path / "out/shards/job-000000.json").write_text(damage, encoding="utf-8")
    again = ("generate", job_file, "prompts.limit=1")
    for command in (("status", "out"), ("index", "out"), ("preview", "out"), again):
        result = madgen_here(*command)
        assert (result.code, len(result.err.strip().splitlines())) == (2, 1), result.err
        assert "job-000000.json is damaged" in result.err
        assert "madgen verify out --repair" in result.err
    assert madgen_here("verify", "out").code == 1
    assert madgen_here("verify", "out", "--repair").code == 1
    assert madgen_here(*again).code == 0
    assert madgen_here("verify", "out").code == 0


@pytest.mark.parametrize("change", [-512, 512])
def test_finished_tar_of_another_size_is_noticed_without_reading_it(madgen_here, job_file, tmp_path, change):
    again = ("generate", job_file, "prompts.limit=1")
    assert madgen_here(*again).code == 0
    tar = tmp_path / "out/shards/job-000000.tar"
    content = tar.read_bytes()
    os.truncate(tar, len(content) + change)
    for command in (("status", "out"), again):
        result = madgen_here(*command)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert f"has {len(content) + change} bytes, expected {len(content)}; run madgen verify out" in result.err
    assert madgen_here("verify", "out", "--repair").code == 1
    assert madgen_here(*again).code == 0
    assert tar.read_bytes() == content


def test_removed_tar_is_regenerated(madgen_here, job_file, tmp_path):
    assert madgen_here("generate", job_file, "prompts.limit=2").code == 0
    tar = tmp_path / "out/shards/job-000001.tar"
    content = tar.read_bytes()
    tar.unlink()
    broken = madgen_here("verify", "out")
    assert (broken.code, "to repair: madgen verify out --repair; then" in broken.out) == (1, True)
    assert "to repair" not in madgen_here("verify", "out", "--repair").out
    assert madgen_here("generate", job_file, "prompts.limit=2").code == 0
    assert tar.read_bytes() == content
    assert madgen_here("verify", "out").code == 0


def test_dataset_json_of_something_else_is_refused(madgen_here, tmp_path):
    (tmp_path / "dataset.json").write_text("{}", encoding="utf-8")
    for command in ("status", "verify", "index", "preview"):
        result = madgen_here(command, tmp_path)
        broken = command == "verify"
        assert result.code == (1 if broken else 2), result.err
        assert "dataset.json is damaged: fingerprint is missing; restore it" in (result.out if broken else result.err)


def test_prompts_that_are_not_set_are_named(madgen_here, tmp_path, tiny):
    (tmp_path / "bare.yaml").write_text(f"backbone: {{pretrained: {tiny}}}\n", encoding="utf-8")
    result = madgen_here("plan", "bare.yaml")
    assert (result.code, "the default where prompts.source is not set, does not exist" in result.err) == (2, True)


@pytest.mark.parametrize("value", ["²", "٣", "-1", "abc"])
def test_terminal_sizes_that_rich_cannot_read_are_ignored(madgen_here, job_file, finished, monkeypatch, value):
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, value)
    assert madgen_here("status", "out").code == 0
