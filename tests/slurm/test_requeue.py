"""Requeue, preemption and lost nodes on a local SLURM."""

import subprocess

import pytest
from processes import begin, environment
from slurm_cluster import TIMEOUT_S, hashes

from madgen.dataset.layout import DatasetDir
from madgen.dataset.verify import exit_code, verify

pytestmark = pytest.mark.slurm


def test_job_resumes_after_requeue_preemption_node_failure_and_scancel(cluster, workplace):
    """Requeue, preempt, take a node down, cancel; then one more job completes the dataset.

    It has 30 shards, more than are finished between the events. No other test uses n3 and n4. Where a node starts
    slowly, the time limit may requeue the job once more.
    """
    options = ("prompts.limit=6", "prompts.samples_per_prompt=5", "sampling.num_inference_steps=75")
    alone = begin(("generate", "job.yaml", "output.dir=events-alone", *options), workplace, environment())
    job = cluster.submit("events", *options, "--nodes", 2, "--partition", "low", "--sbatch=--exclusive")

    def wait_for_progress(restarts):
        cluster.until(lambda: runs_again(cluster.state(job), restarts), f"restart {restarts}")
        cluster.until_made("events", cluster.made("events") + 1)

    wait_for_progress(0)
    cluster.run("scontrol", "requeue", job)
    wait_for_progress(1)

    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    wait_for_progress(2)

    cluster.run("scontrol", "update", "nodename=n4", "state=down", "reason=test")
    cluster.until(lambda: cluster.state(job)["JobState"] != "RUNNING", "the job to leave its nodes")
    cluster.until(lambda: not step_daemons(job), "its daemons to end, else the node mistakes them for the next run's")
    cluster.run("scontrol", "update", "nodename=n4", "state=resume", check=False)  # refused where it is back already
    wait_for_progress(3)

    cluster.run("scancel", job)
    cluster.until_ended(job)
    state = cluster.state(job)
    assert state["JobState"] == "CANCELLED", cluster.log(job)
    assert int(state["Restarts"]) >= 3, cluster.log(job)
    assert cluster.made("events") < 30
    cluster.until_ended(cluster.submit("events", *options))
    assert exit_code(verify(DatasetDir(workplace / "events"))) == 0, cluster.logs()
    assert alone.wait(TIMEOUT_S) == 0, alone.output()
    assert hashes(workplace / "events") == hashes(workplace / "events-alone")


def step_daemons(job):
    return subprocess.run(["pgrep", "-f", rf"^slurmstepd: \[{job}\."], capture_output=True, check=False).stdout


def runs_again(state, restarts):
    return state["JobState"] == "RUNNING" and int(state["Restarts"]) >= restarts


def test_job_is_not_requeued_beyond_max_restarts(cluster):
    cluster.env["MADGEN_MAX_RESTARTS"] = "0"
    job = cluster.submit("restarts", "sampling.num_inference_steps=75")
    cluster.until_made("restarts", 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until_ended(job)
    state = cluster.state(job)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "3:0"), cluster.log(job)
    assert "not requeued: already restarted 0 times (MADGEN_MAX_RESTARTS)" in cluster.log(job)
