"""Datasets run no code, leave no file outside their directory and publish no secret."""

import ast
import json
from pathlib import Path

import pytest
from processes import ROOT

import madgen as package

SECRET = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.slow
def test_no_secret_is_in_any_file_or_log(madgen, job_file, tmp_path):
    """W&B is offline, but has the key; the hub's token is in the environment."""
    result = madgen(
        "generate", job_file, "monitor.wandb.mode=offline", "prompts.limit=1", WANDB_API_KEY=SECRET, HF_TOKEN=SECRET,
        HUGGING_FACE_HUB_TOKEN=SECRET, WANDB_DIR=str(tmp_path), AWS_SECRET_ACCESS_KEY=SECRET,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert SECRET not in result.out + result.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_nothing_is_written_outside_the_dataset(madgen, job_file, tmp_path):
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    assert madgen("generate", job_file, "prompts.limit=1", WANDB_DIR=str(tmp_path)).code == 0
    assert {path for path in tmp_path.rglob("*") if "out" not in path.relative_to(tmp_path).parts} == before


def test_prompt_is_never_interpreted(madgen_here, job_file, tmp_path):
    """Neither HTML, nor YAML, nor a path, nor a format string, wherever it is shown."""
    nasty = '</script><script>alert(1)</script> {0} %s ${oc.env:HOME} ../../x "quoted" \\n --- \u2028'
    (tmp_path / "nasty.jsonl").write_text(json.dumps({"prompt": nasty}), encoding="utf-8")
    options = ["prompts.source=nasty.jsonl", "prompts.samples_per_prompt=1"]
    assert madgen_here("generate", job_file, *options).code == 0
    assert madgen_here("verify", "out").code == 0
    assert madgen_here("preview", "out").code == 0
    page = (tmp_path / "out/preview.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "alert(1)" in page
    (entry,) = json.loads((tmp_path / "out/shards/job-000000.json").read_text(encoding="utf-8"))["samples"]
    assert entry["prompt"] == nasty


def test_nothing_is_unpickled_or_evaluated():
    """No pickle, eval, exec, shell or unsafe YAML loader in the package; `torch.load` only with weights_only."""
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for path in sorted((ROOT / "madgen").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not names & forbidden, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"}, path
                words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert words.get("shell", "False") == "False", path
                if name == "torch.load":
                    assert words.get("weights_only") == "True", path
    assert Path(package.__file__).is_relative_to(ROOT)
