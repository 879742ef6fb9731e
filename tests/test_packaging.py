"""The wheel and the source distribution outside a checkout, and the recipes for containers, conda and CI."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from forks import WAIT_S

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=WAIT_S,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def build(source, kind, folder, pattern):
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source)
    (file,) = folder.glob(pattern)
    return file


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution of the checkout, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = build(ROOT, "sdist", folder, "*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return sdist, build(source, "wheel", folder, "*.whl")


@pytest.mark.slow
def test_wheel_contains_everything_that_commands_need(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"madgen/{path.relative_to(ROOT / 'madgen')}" for path in (ROOT / "madgen").rglob("*.py")}
    expected |= {"madgen/py.typed", "madgen/_slurm/generate.sbatch", "madgen/_slurm/apptainer/madgen.def"}
    expected |= {
        f"madgen/_{path.relative_to(ROOT)}" for name in ("configs", "jobs") for path in (ROOT / name).rglob("*.*")
    }
    assert expected <= names
    assert not [name for name in names if not name.startswith(("madgen/", "madgen-"))]
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "constraints.txt", "tests/conftest.py", "pyproject.toml", "slurm/array.sbatch"} <= members


@pytest.mark.slow
def test_installed_wheel_works_outside_the_checkout(distributions, tmp_path):
    site, place = tmp_path / "site", tmp_path / "place"
    place.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", site, distributions[1], cwd=place)
    madgen = [sys.executable, "-m", "madgen"]

    def installed(*arguments):
        return run(*madgen, *arguments, cwd=place, PYTHONPATH=str(site))

    where = run(sys.executable, "-c", "import madgen; print(madgen.__file__)", cwd=place, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    assert "24 panoramas in 6 shards" in installed("plan", "demo")
    installed("init", "alps.yaml")
    small = ["prompts.limit=1", "prompts.samples_per_prompt=1", "sampling.num_inference_steps=1", "sampling.width=256"]
    installed("generate", "alps.yaml", *small, "monitor.wandb.mode=disabled")
    assert "1 of 1 panorama present" in installed("verify", "out/alps")
    assert "#SBATCH" in installed("submit", "alps.yaml", "output.dir=out/new", "--time", "1:00:00", "--dry-run")


def test_dockerfile_is_clean():
    run(Path(sys.executable).with_name("hadolint"), "Dockerfile", cwd=ROOT)


def test_workflow_is_valid():
    check = Path(sys.executable).with_name("check-jsonschema")
    run(check, "--builtin-schema", "vendor.github-workflows", ".github/workflows/ci.yml", cwd=ROOT)


def test_containers_install_alike():
    docker, apptainer = (
        re.findall(r"pip install .*", (ROOT / name).read_text(encoding="utf-8"))
        for name in ("Dockerfile", "slurm/apptainer/madgen.def")
    )
    assert docker == apptainer
    assert len(docker) == 1


def test_apptainer_wrapper_passes_arguments_and_signals(tmp_path):
    """A stand-in for apptainer, which cannot run in every test environment, prints what it gets."""
    fake = tmp_path / "apptainer"
    fake.write_text('#!/bin/sh\necho "$$ $*"\n', encoding="utf-8")
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    wrapper = ROOT / "slurm/apptainer/madgen"
    with subprocess.Popen(
        [wrapper, "generate", "a b.yaml"],
        env={**os.environ, "PATH": path, "MADGEN_SIF": "/i.sif", "MADGEN_APPTAINER_OPTIONS": "--bind /data"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        printed, _ = process.communicate(timeout=WAIT_S)
    assert printed == f"{process.pid} run --nv --bind /data /i.sif generate a b.yaml\n"  # the same process: exec
    missing = subprocess.run([wrapper], env={"PATH": path}, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert missing.returncode != 0
    assert "MADGEN_SIF: set it to the image" in missing.stderr


def test_conda_environment_installs_the_checkout():
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert content["dependencies"][-1] == {"pip": ["-c constraints.txt", ".[eval]"]}
