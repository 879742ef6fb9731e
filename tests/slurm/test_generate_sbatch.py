"""slurm/generate.sbatch on a real SLURM of two nodes on this machine."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

SCRIPT = Path(__file__).parent / "slurm_local.sh"


@pytest.fixture(scope="module")
def cluster():
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("a local SLURM needs root on Debian")
    up = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, timeout=600, check=False)
    if up.returncode != 0:
        pytest.skip(f"SLURM cannot be started here: {up.stderr[-300:]}")
    line = subprocess.run([SCRIPT, "env"], capture_output=True, text=True, check=True).stdout
    yield line.removeprefix("export SLURM_CONF=").strip().strip("'")
    subprocess.run([SCRIPT, "down"], capture_output=True, timeout=120, check=False)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shards/*.tar"))}


def test_two_nodes_make_the_bytes_of_one_process(cluster, madgen, job_file, tmp_path):
    assert madgen("generate", job_file).code == 0
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--wait", "--output=job.log"]
    done = subprocess.run(
        ["sbatch", *options, ROOT / "slurm/generate.sbatch", job_file, "output.dir=cluster"],
        cwd=tmp_path, env=environment(SLURM_CONF=cluster, PATH=paths),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    log = (tmp_path / "job.log").read_text() if (tmp_path / "job.log").exists() else ""
    assert done.returncode == 0, done.stderr + log
    assert hashes(tmp_path / "cluster") == hashes(tmp_path / "out")
    assert madgen("verify", "cluster").code == 0
