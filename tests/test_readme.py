"""The README's demo job, as its first command runs it but with fewer panoramas, and its length."""

import io
import shlex
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from documentation import named_command
from PIL import Image
from processes import ROOT, begin, environment

from madgen.utils.console import plural

PANORAMAS = 1
"""Of the 24 of the demo job."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the README's demo job has run, in a new interpreter."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "jobs"):
        (folder / name).symlink_to(ROOT / name)
    arguments = shlex.split(named_command("run").split(".venv/bin/madgen ")[1])
    arguments += [f"prompts.limit={PANORAMAS}"]
    command = [sys.executable, "-m", "madgen", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def test_demo_job_with_fewer_panoramas_and_steps_completes(madgen, tmp_path):
    """The end-to-end run of the default tier."""
    for name in ("configs", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    options = ["prompts.limit=1", "sampling.width=256", "sampling.num_inference_steps=2", "method.mad.steps=1"]
    result = madgen("generate", "jobs/demo.yaml", *options)
    assert result.code == 0, result.err
    assert madgen("verify", "out/demo").out == "1 of 1 panorama present: as planned\n"


@pytest.mark.slow
def test_demo_job_writes_its_panoramas(workplace):
    process = begin(("verify", "out/demo"), workplace, environment())
    expected = f"{PANORAMAS} of {plural(PANORAMAS, 'panorama')} present: as planned\n"
    assert (process.wait(), process.output()[0]) == (0, expected)


def test_demo_job_has_the_number_of_panoramas_that_the_readme_names(madgen, tmp_path):
    for name in ("configs", "jobs"):
        (tmp_path / name).symlink_to(ROOT / name)
    planned = int(madgen("plan", "jobs/demo.yaml").out.split()[1])
    assert f"generates {planned} panoramas" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_panoramas_are_landscapes(workplace):
    """Sky above ground: colors change far more down the picture than along it."""
    for path in sorted((workplace / "out/demo/shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    image = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read()))).astype(float)
                    assert image.shape == (128, 768, 3)
                    rows = np.median(image, axis=1)
                    along = np.abs(np.diff(image, axis=1)).mean()
                    assert rows.std(axis=0).mean() > 4 * along, member.name


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
