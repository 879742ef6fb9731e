"""Untrusted job files: no environment variable is recorded, and invalid files give one line."""

import json
import logging
import re

import pytest
import yaml
from omegaconf import OmegaConf

from madgen import load_job
from madgen.cli.app import main
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


def test_environment_variables_are_not_read_by_bases_lists_and_resolvers_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    OmegaConf.register_resolver("mine", lambda: "hunter2", replace=True)
    (tmp_path / "base.yaml").write_text("prompts: {across: [a, '${oc.env:SECRET}']}\n", encoding="utf-8")
    (tmp_path / "job.yaml").write_text("base: base.yaml\n", encoding="utf-8")
    for paths, overrides in (
        ([tmp_path / "job.yaml"], []),
        ([], ["backbone.loras=[{weights: '${mine:}'}]"]),
        ([], ["name=${oc.dict.keys:prompts}"]),
        ([], ["prompts.negative_prompt=${name}${oc.env:SECRET}"]),
        ([], ["prompts.negative_prompt=${oc.${name}:SECRET}"]),
    ):
        with pytest.raises(UserError, match="environment variables are not read"):
            load_job(paths, overrides)


@pytest.mark.parametrize(
    "value",
    [
        "https://user:pa55@host/prompts.txt",
        "s3://AKIA0000:secret@bucket/prompts.txt",
        "https://ghp_0123456789@github.com/a/b",
        "https://host/p.txt?X-Amz-Credential=AKIA0&X-Amz-Signature=abcdef",
        "https://account.blob.core.windows.net/c/p.txt?sv=2022&sig=abc%3D",
        "https://host/p.txt?a=1&access_token=abcdef",
        "hf_0123456789abcdef",
    ],
)
@pytest.mark.parametrize(
    "key",
    ["prompts.source", "output.upload", "output.dir", "backbone.pretrained", "monitor.wandb.group", "scores.clip"],
)
def test_credentials_are_refused_and_not_printed(key, value, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    with pytest.raises(UserError, match=key) as error:
        load_job(overrides=[f"{key}={json.dumps(value)}"])
    for secret in ("pa55", "secret@", "ghp_", "abc", "AKIA0"):
        assert secret not in str(error.value)


@pytest.mark.parametrize(
    "value", ["s3://bucket/folder", "sftp://user@host/folder", "https://host/p.txt?page=2", "a token=garden, 2? sig"]
)
def test_urls_and_texts_without_credentials_are_accepted(value):
    assert load_job(overrides=[f"prompts.negative_prompt={value}"]).prompts.negative_prompt == value


def test_credentials_are_masked_in_errors_and_logs(madgen_here, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    result = madgen_here("plan", "https://user:pa55@host/0123456789abcdef.yaml")
    assert result.code == 2
    assert "***@host/***.yaml" in result.err
    assert "pa55" not in result.err
    logging.getLogger("madgen").warning("cannot reach https://user:pa55@host/x?sig=abc")
    assert capfd.readouterr().err == "madgen: cannot reach https://***@host/x?sig=***\n"


PATHS = ["output.dir", "prompts.source", "backbone.pretrained", "backbone.config", "safety.checker", "scores.clip"]


@pytest.mark.parametrize("key", [*PATHS, "backbone.loras", "prompts.regions"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a\0b", "contains a NUL character"),
        ("a" * 300, "too long|does not exist|exists neither|neither a folder"),
        ("/".join(["folder"] * 700), "too long|does not exist|exists neither|neither a folder"),
        ("a\ud800b", "must be valid Unicode|cannot read|not valid YAML"),
    ],
    ids=["NUL", "name", "path", "surrogate"],
)
def test_impossible_paths_are_refused(refused, job_file, key, value, message):
    content = yaml.safe_load(job_file.read_text(encoding="utf-8"))
    section, name = key.split(".")
    entry = {"loras": [{"weights": value}], "regions": [{"mask": value, "prompt": "x"}]}.get(name, value)
    content.setdefault(section, {})[name] = entry
    job_file.write_text(json.dumps(content), encoding="utf-8")
    for command in ("plan", "generate"):
        assert re.search(message, error := refused(command, job_file)), error


def test_the_path_of_a_result_may_be_impossible(madgen_here, tmp_path):
    for arguments in (["verify", "a" * 300], ["sample", "hills", "-o", "a" * 300 + ".png"], ["plan", "a" * 300]):
        result = madgen_here(*arguments)
        assert (result.code, len(result.err.splitlines())) == (2, 1), result.err


def test_a_deleted_current_directory_is_named(tmp_path, job_file, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr("sys.argv", ["madgen", "generate", str(job_file), f"output.dir={tmp_path}/out"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("madgen: the current directory cannot be read")
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UserError, match=f"^{key}=~nosuchuser/x: the home directory of '~nosuchuser' is unknown"):
        job = load_job(overrides=[f"{key}=~nosuchuser/x"])
        _touch(key, job)


def _touch(key, job):
    from madgen.hub.auxiliary_models import clip_id
    from madgen.hub.weights import weights_id

    {"output.dir": lambda: job.output_dir, "backbone.pretrained": lambda: weights_id(job.backbone.pretrained),
     "scores.clip": lambda: clip_id(job.scores.clip)}[key]()  # fmt: skip
