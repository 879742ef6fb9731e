"""Whatever the environment holds: a result, or one clear line; never a traceback."""

import random

import pytest

from madgen.cluster.launch import joins_a_group, placement, rank, worker_number
from madgen.cluster.walltime import Walltime, job_end
from madgen.config.schema import TrainerConfig, WandbConfig
from madgen.utils.errors import UserError

NAMES = [
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_END_TIME", "SLURM_PTY_PORT",
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MADGEN_END_TIME", "MADGEN_STOPPED", "MADGEN_PROCESS_GROUP",
    "WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_API_KEY", "WANDB_BASE_URL",
    "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "PAGER", "TZ", "HOME", "NETRC", "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
]  # fmt: skip
VALUES = [
    "", " ", "0", "1", "2", "-1", "1.5", "abc", "9" * 30, "1e400", "nan", "true", "2(x3)", "2(x3),1", "(x2)", "1,,1",
    "bash", "4294967290", "٣", "²", "a\nb", "/nonexistent/x", "[", "http://[", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_launch_variables_give_a_placement_or_one_line(seed):
    chance = random.Random(seed)
    refused = 0
    for _ in range(500):
        variables = {name: chance.choice(VALUES) for name in chance.sample(NAMES, chance.randrange(1, 12))}
        for call in (
            lambda given: placement(TrainerConfig(), dict(given)),
            lambda given: placement(TrainerConfig(devices=2), dict(given)),
            rank,
            worker_number,
            lambda given: WandbConfig().chosen_mode(given),
        ):
            try:
                call(variables)
            except UserError as error:
                refused += 1
                assert str(error).strip()
    assert refused > 100


@pytest.mark.parametrize("value", VALUES)
def test_any_end_of_the_job_is_a_time_or_none(value):
    assert isinstance(job_end({"MADGEN_END_TIME": value}), float | None)
    assert Walltime(job_end({"SLURM_JOB_END_TIME": value})).refuses(0) in (None, Walltime(0.0).refuses(0))


@pytest.mark.parametrize("seed", range(3))
def test_commands_exit_with_one_line_in_any_environment(madgen_here, job_file, tmp_path, monkeypatch, seed):
    chance = random.Random(seed)
    assert madgen_here("generate", job_file, "prompts.limit=1", "trainer.num_nodes=1").code == 0
    for _ in range(6):
        with monkeypatch.context() as patch:
            for name in chance.sample(NAMES, chance.randrange(1, 6)):
                patch.setenv(name, chance.choice(VALUES).replace("\0", ""))
            try:
                joined = joins_a_group(TrainerConfig(accelerator="cpu", devices=1, num_nodes=1))
            except UserError:
                joined = False
            commands = [["plan", job_file], ["status", "out"], ["verify", "out"]]
            for command in commands if joined else [*commands, ["generate", job_file, "prompts.limit=1"]]:
                result = madgen_here(*command)
                assert result.code in (0, 2, 3), result.err
                assert "Traceback" not in result.err
                assert result.code == 0 or len(result.err.strip().splitlines()) == 1, result.err
