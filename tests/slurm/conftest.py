"""A local SLURM of four nodes, a job, and the hashes of its tars."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from processes import begin, environment
from slurm_cluster import TIMEOUT_S, Cluster, hashes

from madgen.dataset.layout import DatasetDir
from madgen.dataset.verify import exit_code, verify

SCRIPT = Path(__file__).parent / "slurm_local.sh"
CLUSTER = {
    "SLURM_LOCAL_CPUS": "128",  # enough for the guide's jobs
    "SLURM_LOCAL_NODES": "4",
    "SLURM_LOCAL_PARTITIONS": "main=n[1-2] high=n[3-4]",
    "SLURM_LOCAL_LOW": "n[3-4]",
    "SLURM_LOCAL_WAIT": "300",
}


@pytest.fixture(scope="session")
def conf():
    """Return the path of slurm.conf. All workers use one cluster: the first starts it, the last takes it down."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("a local SLURM needs root on Debian")
    with open(Path(tempfile.gettempdir()) / "madgen-slurm-tests", "w", encoding="utf-8") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        up = slurm_local("up")
        if up.returncode != 0:
            (pytest.fail if shutil.which("slurmctld") else pytest.skip)(
                f"SLURM does not start here: {up.stderr[-300:]}"
            )
        yield slurm_local("env").stdout.strip().removeprefix("export SLURM_CONF=").strip("'")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            slurm_local("down")


def slurm_local(verb):
    command, env = [SCRIPT, verb], {**os.environ, **CLUSTER}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture(scope="session")
def workplace(tiny, tmp_path_factory):
    """Write a job of 24 shards with one panorama each."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "prompts.txt").write_text(
        "".join(f"mountains over a meadow at noon {i}\n" for i in range(8)), encoding="utf-8"
    )
    (folder / "job.yaml").write_text(
        f"""
backbone: {{pretrained: {json.dumps(str(tiny))}}}
method: {{mad: {{steps: 1}}}}
sampling: {{height: 32, width: 64, num_inference_steps: 20, guidance_scale: 2.0}}
prompts: {{source: prompts.txt, samples_per_prompt: 3}}
output: {{samples_per_shard: 1}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu}}
""",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="session")
def whole(workplace):
    """Return the hashes of the 24 tars that one process writes."""
    process = begin(("generate", "job.yaml", "output.dir=whole"), workplace, environment())
    assert process.wait(TIMEOUT_S) == 0, process.output()
    return hashes(workplace / "whole")


@pytest.fixture
def cluster(request, conf, workplace):
    """Run `madgen` in forks, or the installed program where the parameter is its folder."""
    cluster = Cluster(conf, workplace, getattr(request, "param", None))
    yield cluster
    if cluster.ids:
        cluster.run("scancel", *cluster.ids, check=False)


@pytest.fixture
def assert_complete(cluster, workplace, whole):
    """Check that every key exists once, with the bytes of one process."""

    def check(out):
        assert exit_code(verify(DatasetDir(workplace / out))) == 0, cluster.logs()
        assert hashes(workplace / out) == whole

    return check
