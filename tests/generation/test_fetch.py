"""`madgen fetch` against a local hub server, and errors without a network."""

import pytest
from hub_server import serving

NAME = "someone/tiny"


@pytest.fixture
def hub(tiny):
    """Serve the Hugging Face hub's download API with one model; count the files that were sent."""
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    with serving("models", NAME, files) as (endpoint, served):
        yield {"HF_ENDPOINT": endpoint}, served


@pytest.mark.slow
def test_fetch_then_generate_offline(hub, madgen, job_file, tmp_path):
    online, served = hub
    online = {**online, "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}
    cache = {"HF_HOME": str(tmp_path / "hub")}
    job = [job_file, f"backbone.pretrained={NAME}"]

    missing = madgen("generate", *job, **cache)
    assert missing.code == 2
    assert "madgen fetch JOB.yaml" in missing.err
    assert missing.err.count("\n") == 1

    fetched = madgen("fetch", *job, **online, **cache)
    assert fetched.code == 0, fetched.err
    assert f"backbone.pretrained={NAME}: " in fetched.out
    assert " MB in " in fetched.out
    assert served

    count = len(served)
    again = madgen("fetch", *job, **online, **cache)
    assert (again.code, len(served)) == (0, count), "nothing is downloaded twice"

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
