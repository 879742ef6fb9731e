"""Detection of the launcher, and errors when the job requests another number of processes."""

import json
import re
import socket
import time

import psutil
import pytest
from processes import MADGEN, Forked, environment

from madgen.cluster.launch import placement, rank, strategy, worker_number
from madgen.config.schema import TrainerConfig
from madgen.utils.errors import UserError


def step(per_node="2(x2)", **others):
    """Return the variables of a task of srun, among them those of a job of another size."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "demo", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0",
        "SLURM_NTASKS_PER_NODE": "16", "SLURM_NNODES": "9", "SLURM_STEP_TASKS_PER_NODE": per_node, **others,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("per_node", "devices", "nodes"),
    [("1", 1, 1), ("4", 4, 1), ("2(x2)", 2, 2), ("8(x128)", 8, 128), ("2,2(x3)", 2, 4)],
)
def test_srun_is_detected(per_node, devices, nodes):
    variables = step(per_node)
    found = placement(TrainerConfig(), variables)
    assert (found.kind, found.devices, found.nodes) == ("srun", devices, nodes)
    assert found.joins_a_group == (devices * nodes > 1)
    assert (variables["SLURM_NTASKS_PER_NODE"], variables["SLURM_NNODES"]) == (str(devices), str(nodes))


def test_torchrun_takes_precedence_over_srun():
    variables = step(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2", WORLD_SIZE="6")
    found = placement(TrainerConfig(), variables)
    assert (found.kind, found.devices, found.nodes) == ("torchrun", 2, 3)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "", "SLURM_STEP_ID": ""},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"},
        step(SLURM_JOB_NAME="interactive", SLURM_STEP_ID="4294967290"),
        step("1", SLURM_JOB_NAME="bash"),
    ],
)
def test_a_shell_is_not_a_launcher(variables):
    found = placement(TrainerConfig(devices=2), variables)
    assert (found.kind, found.devices, found.nodes, found.joins_a_group) == ("alone", 2, 1, False)


@pytest.mark.parametrize("name", ["interactive", "bash"])
def test_srun_inside_salloc_is_a_step_of_its_tasks(name):
    """It inherits the name of the shell's job, and must not be taken for the shell."""
    variables = step("4", SLURM_JOB_NAME=name, SLURM_PROCID="2")
    found = placement(TrainerConfig(), variables)
    assert (found.kind, found.devices, found.nodes, rank(variables)) == ("srun", 4, 1, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, "LOCAL_WORLD_SIZE is missing"),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "0", "WORLD_SIZE": "2"}, "contradict each other"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "two", "WORLD_SIZE": "2"},
            "LOCAL_WORLD_SIZE must be a whole",
        ),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "abc"}, "SLURM_NTASKS must be a whole number >= 0, got 'abc'"),
        (step("many"), "SLURM_STEP_TASKS_PER_NODE must be like 2(x3), got 'many'"),
    ],
)
def test_malformed_variables_are_named(variables, message):
    with pytest.raises(UserError, match=re.escape(message)):
        placement(TrainerConfig(), variables)


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "abc"}, {"SLURM_ARRAY_TASK_ID": "-1"}])
def test_malformed_ranks_are_named(variables):
    with pytest.raises(UserError, match=f"{next(iter(variables))} must be a whole number"):
        worker_number(variables)


def test_empty_variables_count_as_missing():
    assert worker_number({"SLURM_ARRAY_TASK_ID": "", "LOCAL_RANK": ""}) == 0


@pytest.mark.parametrize(
    ("config", "variables", "message"),
    [
        ({"devices": 4}, step(), "srun started 2 tasks per node (--ntasks-per-node=2); set trainer.devices=auto"),
        ({"num_nodes": 3}, step(), "srun started 2 nodes (--nodes=2); set trainer.num_nodes=auto"),
        ({}, step("2,1"), "srun started 2 + 1 tasks on 2 nodes; request the same number on each with --ntasks-per-n"),
        ({}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "this job has 4 tasks, but madgen was started once"),
        ({"num_nodes": 2}, {}, "needs srun or torchrun"),
        (
            {"devices": 1},
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"},
            "torchrun started 2 tasks per node (--nproc-per-node=2)",
        ),
    ],
)
def test_mismatch_names_the_launchers_option(config, variables, message):
    with pytest.raises(UserError) as refused:
        placement(TrainerConfig(**config), variables)
    assert message in str(refused.value)


def test_processes_synchronize_over_gloo_with_a_timeout():
    for name in ("auto", "ddp"):
        made = strategy(name, 2)
        assert made.process_group_backend == "gloo"
        assert made._timeout.total_seconds() == 1800
    assert strategy("auto", 1) == "auto"


def test_ranks_and_array_tasks_differ():
    assert rank({}) == rank({"RANK": "3", "WORLD_SIZE": "4"}) == 0  # variables of no known launcher
    assert rank({"LOCAL_RANK": "1"}) == 1
    assert rank(step(SLURM_PROCID="3")) == 3
    assert rank(step(SLURM_STEP_ID="4294967290", SLURM_PROCID="0", LOCAL_RANK="1")) == 1
    assert rank(step(TORCHELASTIC_RUN_ID="x", RANK="2")) == 2
    assert worker_number({}) == 0
    assert worker_number(step(SLURM_PROCID="3", SLURM_LOCALID="1")) == 3
    assert worker_number(step(SLURM_ARRAY_TASK_ID="7")) == 7


def test_two_ranks_of_torchrun_write_the_bytes_of_one_process(start, job_file, tmp_path):
    """As torchrun starts them, without the imports of two interpreters."""
    options = ["generate", job_file, "output.samples_per_shard=1", "sampling.num_inference_steps=10"]
    assert start(*options, "output.dir=one").wait() == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "x"}
    world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    options += ["output.dir=two", "trainer.devices=auto"]
    ranks = [start(*options, **world, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output() for rank in ranks]
    one, two = (sorted(tmp_path.glob(f"{out}/shards/*.tar")) for out in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    sidecars = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("two/shards/*.json")]
    assert len({sidecar["worker"] for sidecar in sidecars}) == 2


@pytest.mark.parametrize("dies", [False, True])
def test_a_rank_that_is_lost_at_the_start_stops_the_others_early(job_file, tmp_path, dies):
    """It does not start at all, or `dies` when all have met."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "SLURM_NTASKS": "2"}
    world |= {**step("1(x2)"), "SLURM_LOCALID": "0", "MADGEN_STOPPED": str(tmp_path / "stopped")}

    def run(rank, code):
        here = {**environment(), **world, "SLURM_PROCID": rank, "SLURM_NODEID": rank}
        return Forked(("generate", job_file), tmp_path, here, f"{code}\n{MADGEN}")

    lost = run("1", "import os, madgen.generation.run as run; run.PromptDataModule.setup = lambda *_: os._exit(9)")
    if not dies:
        lost.kill()
    timeout = f"datetime.timedelta(seconds={600 if dies else 2})"
    first = run("0", f"import datetime, madgen.cluster.launch as launch; launch.START_TIMEOUT = {timeout}")
    (status, (out, err)) = first.wait(), first.output()
    assert (status, out) == (3, ""), err
    assert "another process of this run did not start, or died" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (tmp_path / "stopped").read_text(encoding="utf-8") == "lost process\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_generates_all_shards(job_file, tmp_path):
    options = ("--standalone", "--nproc-per-node=2", "-m", "madgen", "generate", job_file, "trainer.devices=auto")
    torchrun = Forked(options, tmp_path, environment(), "from torch.distributed.run import main; main()")
    assert torchrun.wait() == 0, torchrun.output()
    assert len(list((tmp_path / "out/shards").glob("*.tar"))) == 4


@pytest.mark.slow
def test_idle_rank_ends_while_another_works(start, job_file, tmp_path):
    """With one shard for three processes, rank 0 waits for its worker and the others end."""
    options = ["trainer.devices=3", "output.samples_per_shard=10", "sampling.num_inference_steps=50"]
    process = start("generate", job_file, *options)
    most, fewest = 0, 3
    while process.poll() is None:
        alive = len(running(process.pid))
        if list((tmp_path / "out").glob("work/open/*.tar")):
            fewest = min(fewest, alive)
        most = max(most, alive)
        time.sleep(0.05)
    assert process.wait() == 0, process.output()
    assert most >= 2, "processes beside rank 0"  # a helper of a moment may be seen too
    assert fewest < most
    assert (tmp_path / "out/shards/job-000000.tar").exists()


def running(pid):
    """Return the children of a process."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []
