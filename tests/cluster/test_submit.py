"""`madgen submit`: the rendered script, and errors before anything is submitted."""

import re
import subprocess

import pytest
from processes import ROOT

from madgen.cluster.sbatch import Resources, template


def body(name):
    return template(name).partition("set -euo pipefail\n")[2]


def test_templates_are_valid_bash_and_run_the_same_commands():
    assert body("generate") == body("array")
    for name in ("generate.sbatch", "array.sbatch", "evaluate.sbatch", "env.example.sh"):
        subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)
    for name in ("generate", "array"):
        for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@"):
            assert f"#SBATCH {option}" in template(name)


def test_rendered_script_holds_each_option_once(madgen_here, job_file, tmp_path):
    (tmp_path / "env.sh").touch()
    options = ["--nodes", 2, "--tasks-per-node", 4, "--cpus-per-task", 2, "--time", "1-12:00:00", "--partition", "cpu"]
    arguments = ["submit", job_file, "trainer.devices=auto", "output.dir=a b", *options, "--sbatch=--signal=B:USR1@600"]
    result = madgen_here(*arguments, "--env", "env.sh", "--dry-run")
    assert result.code == 0, result.err
    subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)
    found = re.findall(r"^#SBATCH (.*)$", result.out, re.MULTILINE)
    assert len({option.partition("=")[0] for option in found}) == len(found), "no option twice"
    assert {
        "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=2", "--time=1-12:00:00", "--partition=cpu", "--requeue",
        "--signal=B:USR1@600", "--job-name=job",
    } <= set(found)  # fmt: skip
    assert "trainer.devices=auto 'output.dir=a b'" in result.out
    assert f"MADGEN_ENV={tmp_path}/env.sh" in result.out
    assert not (tmp_path / "out").exists()


def test_each_gpu_has_one_task():
    lines = Resources(gpus_per_node=8).lines("x")
    assert "#SBATCH --ntasks-per-node=8" in lines
    assert "#SBATCH --gpus-per-node=8" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", 0], "--nodes must be >= 1, got 0"),
        (["--time", "tomorrow"], "--time must be like 24:00:00"),
        (["--array", "0..7"], "--array must be like 0-63"),
        (["--array", "0-7", "--nodes", 2], "an array task runs on one node"),
        (["--tasks-per-node", 2], "trainer.devices=1, but 2 processes per node are requested"),
        (["trainer.accelerator=gpu"], "no GPU is requested; add --gpus-per-node 8"),
        (["--gpus-per-node", 1], "trainer.accelerator=cpu would leave the GPUs idle"),
        (["--sbatch", "oops"], "--sbatch takes an option of sbatch"),
        (["--env", "nothing.sh"], "--env=nothing.sh is not a file"),
        (["sampling.width=65"], "width=65 px"),
        (["nonsense=1"], "unknown key"),
        (["prompts.source=nothing.txt"], "nothing.txt"),
    ],
)
def test_wrong_options_are_refused_in_one_line(madgen_here, job_file, options, message):
    result = madgen_here("submit", job_file, *options, "--dry-run")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_missing_sbatch_is_an_error(madgen_here, job_file, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = madgen_here("submit", job_file)
    assert result.code == 2
    assert result.err == (
        "madgen: sbatch is not installed here: run this on the cluster's login node, or add --dry-run\n"
    )


def test_more_workers_than_shards_are_noted(madgen_here, job_file):
    result = madgen_here("submit", job_file, "--array", "0-63", "--dry-run")
    assert result.code == 0
    assert "4 shards for 64 workers" in result.err


def test_help_states_the_cores_of_the_scripts(madgen_here):
    scripts = [script.read_text(encoding="utf-8") for script in (ROOT / "slurm").glob("*.sbatch")]
    (cores,) = {re.search(r"#SBATCH --cpus-per-task=(\d+)", script)[1] for script in scripts}
    text = " ".join(madgen_here("submit", "--help").out.split())
    assert re.search(rf"CPU cores per process\W+default: \(?{cores}\b", text), text
