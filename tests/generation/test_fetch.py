"""`madgen fetch` against a local hub server, and errors without a network."""

import subprocess
import sys

import pytest
from hub_server import serving
from processes import environment

NAME = "someone/tiny"
TWICE = """
from madgen.cli.app import main
for _ in range(2):
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
"""
"""`madgen`, run twice in one process."""


@pytest.fixture
def hub(tiny):
    """Serve the Hugging Face hub's download API with one model; count the files that were sent."""
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    with serving("models", NAME, files) as (endpoint, served):
        yield {"HF_ENDPOINT": endpoint}, served


def test_generate_without_the_model_names_fetch(madgen_here, job_file):
    missing = madgen_here("generate", job_file, f"backbone.pretrained={NAME}")
    assert missing.code == 2
    assert "madgen fetch JOB.yaml" in missing.err
    assert missing.err.count("\n") == 1


@pytest.mark.slow
def test_fetch_then_generate_offline(hub, madgen, job_file, tmp_path):
    online, served = hub
    online = {**online, "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}
    cache = {"HF_HOME": str(tmp_path / "hub")}
    job = [job_file, f"backbone.pretrained={NAME}"]

    command = [sys.executable, "-c", TWICE, "fetch", *job]
    fetched = subprocess.run(
        command, cwd=tmp_path, env=environment(**online, **cache), capture_output=True, text=True, check=False
    )
    assert fetched.returncode == 0, fetched.stderr
    assert f"backbone.pretrained={NAME}: " in fetched.stdout
    assert " MB in " in fetched.stdout
    assert served
    assert len(served) == len(set(served)), "a file was downloaded twice"

    made = madgen("generate", *job, "prompts.limit=1", **cache)
    assert made.code == 0, made.err


def test_local_files_are_not_downloaded(madgen_here, job_file):
    for pretrained in ([], ["backbone.pretrained=demo"]):
        result = madgen_here("fetch", job_file, *pretrained)
        assert (result.code, "nothing to download" in result.out) == (0, True), result.err


def test_missing_model_is_a_one_line_error(madgen_here, job_file):
    result = madgen_here("fetch", job_file, "backbone.pretrained=nobody/nothing")
    assert result.code == 2
    assert result.err.startswith("madgen: backbone.pretrained='nobody/nothing' is neither")
    assert result.err.count("\n") == 1
