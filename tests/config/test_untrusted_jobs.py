"""Job files from elsewhere: nothing of the environment is recorded, and bad ones get one clear line."""

import pytest

from madgen import load_job
from madgen.utils.errors import UserError


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "${oc.env:SECRET,none}",
        "${ oc.env:SECRET}",
        "a ${oc.decode:${oc.env:SECRET}}",
        "${oc.${name}:SECRET}",
    ],
)
def test_environment_variables_are_not_read(value, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    job = tmp_path / "job.yaml"
    job.write_text(f"prompts: {{negative_prompt: '{value}'}}\n", encoding="utf-8")
    for paths, overrides in (([job], []), ([], [f"prompts.negative_prompt={value}"])):
        with pytest.raises(UserError, match=r"prompts\.negative_prompt=.* environment variables are not read"):
            load_job(paths, overrides)


def test_a_job_refers_to_its_own_keys(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("output: {dir: 'out/${name}-${sampling.width}'}\nsampling: {width: 1024}\n", encoding="utf-8")
    assert load_job(job).output.dir == "out/job-1024"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("output.dir=a #b", "a #b"),
        ("output.dir=  a #b  ", "a #b"),
        ("output.dir='a #b'", "a #b"),
        ("output.dir=a#b", "a#b"),
        ("output.dir=ü 東 #1", "ü 東 #1"),
        ('output.dir=say "x" #1', 'say "x" #1'),
    ],
)
def test_overrides_keep_number_signs(text, value):
    assert load_job(overrides=[text]).output.dir == value


@pytest.mark.parametrize(
    "content", ["prompts: {regions: " + "[" * 3000 + "]" * 3000 + "}", "{a: " * 2000 + "1" + "}" * 2000]
)
def test_deep_nesting_is_refused(content, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="nested too deeply"):
        load_job(job)


@pytest.mark.parametrize("key", ["output.dir", "prompts.source", "backbone.pretrained", "scores.clip"])
def test_unknown_home_directories_are_named(key):
    with pytest.raises(UserError, match="home directory of '~nosuchuser' is unknown"):
        job = load_job(overrides=[f"{key}=~nosuchuser/x"])
        _touch(key, job)


def _touch(key, job):
    from madgen.hub.weights import clip_id, weights_id

    {"output.dir": lambda: job.output_dir, "backbone.pretrained": lambda: weights_id(job.backbone.pretrained),
     "scores.clip": lambda: clip_id(job.scores.clip)}[key]()  # fmt: skip
