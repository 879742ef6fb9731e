"""Jobs on a local SLURM: DDP over two nodes, killed ranks, arrays, the time limit, task counts."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from processes import ROOT, begin, environment
from slurm_cluster import TIMEOUT_S, hashes

from madgen.dataset.layout import DatasetDir
from madgen.dataset.verify import exit_code, verify

pytestmark = pytest.mark.slurm
QUICK = ("sampling.num_inference_steps=3", "method.mad.steps=2", "monitor.wandb.mode=disabled")


def test_two_nodes_with_two_tasks_write_the_bytes_of_one_process(cluster, assert_complete):
    job = cluster.submit("ddp", "--nodes", 2, "--tasks-per-node", 2)
    seen = {}

    def all_were_seen():
        seen.update({rank: beat["host"] for rank, beat in cluster.workers("ddp").items()})
        return len(seen) == 4

    cluster.until(all_were_seen, "four ranks at work")
    assert sorted(seen) == [0, 1, 2, 3]
    assert set(seen.values()) == {"n1", "n2"}
    cluster.until_ended(job)
    assert cluster.state(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert_complete("ddp")


@pytest.mark.parametrize("cluster", [Path(sys.executable).parent], indirect=True, ids=["installed"])
def test_demo_job_on_two_nodes_writes_the_bytes_of_one_process(cluster, workplace):
    """Run the installed program, with fewer panoramas and steps."""
    job = str(ROOT / "jobs/demo.yaml")
    options = ["trainer.accelerator=cpu", "prompts.limit=8", "output.samples_per_shard=1", *QUICK]
    process = begin(("generate", job, "output.dir=demo-alone", *options), workplace, environment())
    assert process.wait(TIMEOUT_S) == 0, process.output()
    number = cluster.submit("demo", *options, "--nodes", 2, job=job)
    cluster.until_ended(number)
    assert cluster.state(number)["JobState"] == "COMPLETED", cluster.logs()
    assert exit_code(verify(DatasetDir(workplace / "demo"))) == 0
    assert len(hashes(workplace / "demo")) == 8
    assert hashes(workplace / "demo") == hashes(workplace / "demo-alone")


def kill(cluster, out, rank):
    """Kill a rank once two shards are finished."""
    cluster.until_made(out)
    beat = cluster.until(lambda: cluster.workers(out).get(rank), f"rank {rank} at work")
    os.kill(beat["pid"], signal.SIGKILL)


def test_shards_of_a_killed_rank_are_taken_over_and_the_rest_of_the_chain_ends_at_once(cluster, assert_complete):
    """Rank 0 takes over the shards of a rank on its node; the next job of the chain finds the dataset complete."""
    last = cluster.submit("killed", "--tasks-per-node", 2, "--chain", 2)
    assert len(cluster.ids) == 2
    kill(cluster, "killed", 1)
    cluster.until_ended()
    assert [cluster.state(job)["JobState"] for job in cluster.ids][1] == "COMPLETED"
    assert "; 0 generated" in cluster.log(last)
    assert "; 0 generated" not in cluster.log(cluster.ids[0])
    assert_complete("killed")


def test_other_ranks_end_when_rank_0_is_killed_and_a_later_process_completes(cluster, assert_complete):
    job = cluster.submit("killed-0", "--tasks-per-node", 2)
    kill(cluster, "killed-0", 0)
    cluster.until_ended(job)
    cluster.complete_here("killed-0")
    assert_complete("killed-0")


def test_kill_on_bad_exit_ends_the_job_and_a_later_process_completes(cluster, assert_complete, workplace):
    script = workplace / "kill.sbatch"
    script.write_text(
        "#!/bin/bash\nsrun --kill-on-bad-exit=1 madgen generate job.yaml output.dir=bad-exit\n", encoding="utf-8"
    )
    options = ["--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", "--output=job-%j.log"]
    job = cluster.run("sbatch", *options, script).stdout.strip()
    cluster.ids.append(job)
    kill(cluster, "bad-exit", 1)
    cluster.until_ended(job)
    assert cluster.state(job)["JobState"] == "FAILED"
    cluster.complete_here("bad-exit")
    assert_complete("bad-exit")


def test_array_completes_after_a_cancelled_task(cluster, assert_complete):
    array = cluster.submit("array", "--array", "0-3%2")
    cluster.until_made("array", 1)
    cluster.run("scancel", f"{array}_1", check=False)  # refused where it has ended already
    more = cluster.submit("array", "--array", "0-1")
    cluster.until_ended(array, more)
    assert_complete("array")


def test_signal_before_the_time_limit_drains_and_requeues_once(cluster, assert_complete):
    """The rank is stopped until the signal arrives, up to 40 s after the limit was set, so it cannot finish first."""
    job = cluster.submit("limit", "--sbatch=--signal=B:USR1@80")
    cluster.until_made("limit", 1)
    rank = cluster.workers("limit")[0]["pid"]
    os.kill(rank, signal.SIGSTOP)
    hours, minutes, _ = map(int, cluster.state(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={60 * hours + minutes + 2}")
    try:
        cluster.until(lambda: is_pending(rank, signal.SIGUSR1), "the signal")
        assert cluster.state(job)["JobState"] == "RUNNING", cluster.log(job)
    finally:
        os.kill(rank, signal.SIGCONT)
    cluster.until(lambda: cluster.state(job)["JobState"] != "RUNNING", "the rank to drain")
    log = cluster.log(job)
    assert "stopped early" in log, log
    cluster.until_state(job, Restarts="1")
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=10")  # no second signal on a slow machine
    cluster.until_ended(job)
    state = cluster.state(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert_complete("limit")


def is_pending(process, number):
    """Return whether a signal is pending for a stopped process."""
    masks = re.findall(
        r"^(?:Sig|Shd)Pnd:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(encoding="utf-8"), re.MULTILINE
    )
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_task_count_mismatch_names_the_srun_option(cluster):
    def refused(*options, job=()):
        done = cluster.run("srun", *options, "madgen", "generate", "job.yaml", "output.dir=refused", *job, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "srun started 1 tasks per node (--ntasks-per-node=1); set trainer.devices=auto" in refused(
        "-N1", "-n1", job=["trainer.devices=2"]
    )
