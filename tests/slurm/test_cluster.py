"""Jobs on a real SLURM of two nodes on this machine, and what may happen to them."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

from madgen.dataset.layout import DatasetDir
from madgen.dataset.verify import exit_code, verify

SCRIPT = Path(__file__).parent / "slurm_local.sh"
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def conf():
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("a local SLURM needs root on Debian")
    env = {**os.environ, "SLURM_LOCAL_CPUS": "128"}  # claimed, so that the guide's jobs would fit
    up = subprocess.run([SCRIPT, "up"], env=env, capture_output=True, text=True, timeout=600, check=False)
    if up.returncode != 0:
        pytest.skip(f"SLURM cannot be started here: {up.stderr[-300:]}")
    line = subprocess.run([SCRIPT, "env"], capture_output=True, text=True, check=True).stdout
    yield line.removeprefix("export SLURM_CONF=").strip().strip("'")
    subprocess.run([SCRIPT, "down"], capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory):
    """A job of 10 shards of one panorama, on which two processes work for some seconds."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "prompts.txt").write_text("".join(f"mountains over a meadow at noon {i}\n" for i in range(5)))
    (folder / "job.yaml").write_text(
        f"""
backbone: {{pretrained: {json.dumps(str(tiny))}}}
method: {{mad: {{steps: 1}}}}
sampling: {{height: 32, width: 64, num_inference_steps: 60, guidance_scale: 2.0}}
prompts: {{source: prompts.txt, samples_per_prompt: 2}}
output: {{samples_per_shard: 1}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def whole(workplace):
    """The bytes that one process writes."""
    command = [sys.executable, "-m", "madgen", "generate", "job.yaml", "output.dir=whole"]
    subprocess.run(command, cwd=workplace, env=environment(), check=True, timeout=TIMEOUT_S)
    return hashes(workplace / "whole")


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shards/*.tar"))}


class Cluster:
    """`madgen submit` and SLURM's commands, as a user calls them in `folder`."""

    def __init__(self, conf, folder):
        self.folder = folder
        self.env = environment(SLURM_CONF=conf, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        self.ids = []

    def run(self, *command, check=True):
        done = subprocess.run(
            [*map(str, command)], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S,
            check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done

    def submit(self, out, *options):
        """The job's id."""
        command = [sys.executable, "-m", "madgen", "submit", "job.yaml", f"output.dir={out}", "--cpus-per-task", 1]
        said = self.run(*command, "--time", 10, *options).stderr
        self.ids += re.findall(r"scancel (.*?)  ", said)[0].split()
        return self.ids[-1]

    def state(self, job):
        """JobState, Restarts and what else `scontrol` tells of a job."""
        return dict(pair.split("=", 1) for pair in self.run("scontrol", "-o", "show", "job", job).stdout.split(" ")
                    if "=" in pair)  # fmt: skip

    def until(self, true, what):
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := true()):
            assert time.monotonic() < deadline, f"waited for {what}\n{self.logs()}"
            time.sleep(0.1)
        return found

    def until_made(self, out, shards=2):
        self.until(lambda: len(list((self.folder / out / "shards").glob("*.json"))) >= shards, f"{shards} shards")

    def until_ended(self, *jobs):
        listed = ",".join(jobs or self.ids)
        self.until(lambda: not self.run("squeue", "-h", "-j", listed, check=False).stdout.strip(), "the job's end")

    def workers(self, out):
        """Heartbeats by rank."""
        found = (json.loads(path.read_text()) for path in (self.folder / out / "work/workers").glob("*.json"))
        return {beat["rank"]: beat for beat in found if "rank" in beat}

    def log(self, job):
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"job-{job}*.log")))

    def logs(self):
        return "\n".join(f"== {job}\n{self.log(job)}" for job in self.ids) + self.run("squeue", check=False).stdout


@pytest.fixture
def cluster(conf, workplace):
    made = Cluster(conf, workplace)
    yield made
    for node in ("n1", "n2"):
        made.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    if made.ids:
        made.run("scancel", *made.ids, check=False)


@pytest.fixture
def complete(cluster, workplace, whole):
    """Every key once, with the bytes of one process."""

    def check(out):
        found = verify(DatasetDir(workplace / out))
        assert exit_code(found) == 0, cluster.logs()
        assert hashes(workplace / out) == whole
        return True

    return check


def test_two_nodes_with_two_tasks_make_the_bytes_of_one_process(cluster, complete):
    job = cluster.submit("ddp", "--nodes", 2, "--tasks-per-node", 2)
    cluster.until(lambda: sorted(cluster.workers("ddp")) == [0, 1, 2, 3], "four ranks at work")
    cluster.until(lambda: {beat["host"] for beat in cluster.workers("ddp").values()} == {"n1", "n2"}, "both nodes")
    cluster.until_ended(job)
    assert cluster.state(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert complete("ddp")


def test_a_requeued_job_goes_on(cluster, complete):
    job = cluster.submit("requeued", "--nodes", 2)
    cluster.until_made("requeued")
    cluster.run("scontrol", "requeue", job)
    cluster.until_ended(job)
    state = cluster.state(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert complete("requeued")


def test_a_signal_before_the_time_limit_drains_and_requeues_once(cluster, complete):
    """SLURM sends it 10 to 40 s after the start; the rank stands still until then, so its work cannot end first."""
    job = cluster.submit("limit", "--time", 2, "--sbatch=--signal=B:USR1@80")
    cluster.until_made("limit", 1)
    rank = cluster.workers("limit")[0]["pid"]
    os.kill(rank, signal.SIGSTOP)
    try:
        cluster.until(lambda: is_pending(rank, signal.SIGUSR1), "the signal")
        assert cluster.state(job)["JobState"] == "RUNNING", cluster.log(job)
    finally:
        os.kill(rank, signal.SIGCONT)
    cluster.until(lambda: cluster.state(job)["JobState"] != "RUNNING", "the rank to drain")
    log = cluster.log(job)
    assert "stopped early" in log, log
    cluster.until(lambda: cluster.state(job)["Restarts"] == "1", "the requeue")
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=10")  # no second signal, however slow it is
    cluster.until_ended(job)
    state = cluster.state(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert complete("limit")


def is_pending(process, number):
    """Whether a stopped process has been sent a signal."""
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_a_preempted_job_gives_way_and_goes_on(cluster, complete):
    job = cluster.submit("preempted", "--nodes", 2, "--partition", "low", "--sbatch=--exclusive")
    cluster.until_made("preempted")
    other = cluster.run("sbatch", "--parsable", "--partition=main", "--nodes=2", "--exclusive", "--wrap=sleep 1").stdout
    cluster.until_ended(job, other.strip())
    state = cluster.state(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert complete("preempted")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_delays_nobody(cluster, complete, rank):
    """The others go on; rank 0 takes over what a rank on its node leaves."""
    out = f"killed-{rank}"
    job = cluster.submit(out, "--tasks-per-node", 2)
    cluster.until_made(out)
    beat = cluster.until(lambda: cluster.workers(out).get(rank), f"rank {rank} at work")
    os.kill(beat["pid"], signal.SIGKILL)
    cluster.until_ended(job)
    if rank == 0:
        cluster.until_ended(cluster.submit(out))
    assert complete(out)


def test_kill_on_bad_exit_ends_the_job_and_one_more_completes(cluster, complete, workplace):
    script = workplace / "kill.sbatch"
    script.write_text("#!/bin/bash\nsrun --kill-on-bad-exit=1 madgen generate job.yaml output.dir=bad-exit\n")
    options = ["--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", "--output=job-%j.log"]
    job = cluster.run("sbatch", *options, script).stdout.strip()
    cluster.ids.append(job)
    cluster.until_made("bad-exit")
    beat = cluster.until(lambda: cluster.workers("bad-exit").get(1), "rank 1 at work")
    os.kill(beat["pid"], signal.SIGKILL)
    cluster.until_ended(job)
    assert cluster.state(job)["JobState"] == "FAILED"
    cluster.until_ended(cluster.submit("bad-exit"))
    assert complete("bad-exit")


def test_a_lost_node_makes_slurm_start_the_job_again(cluster, complete):
    job = cluster.submit("node", "--nodes", 2)
    cluster.until_made("node")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.until(lambda: cluster.state(job)["JobState"] != "RUNNING", "the job to notice")

    def ended():
        cluster.run(
            "scontrol", "update", "nodename=n2", "state=resume", check=False
        )  # refused where it is back already
        return not cluster.run("squeue", "-h", "-j", job, check=False).stdout.strip()

    cluster.until(ended, "the job's end")
    assert (cluster.state(job)["JobState"], cluster.state(job)["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert complete("node")


def test_a_cancelled_job_stays_cancelled_and_one_more_completes(cluster, complete):
    job = cluster.submit("cancelled", "--nodes", 2)
    cluster.until_made("cancelled")
    cluster.run("scancel", job)
    cluster.until_ended(job)
    assert (cluster.state(job)["JobState"], cluster.state(job)["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    cluster.until_ended(cluster.submit("cancelled"))
    assert complete("cancelled")


def test_an_array_loses_a_task_and_gets_two_more(cluster, complete):
    array = cluster.submit("array", "--array", "0-7%2")
    cluster.until_made("array", 1)
    cluster.run("scancel", f"{array}_1")
    more = cluster.submit("array", "--array", "0-1")
    cluster.until_ended(array, more)
    assert complete("array")


def test_a_chain_ends_at_once_when_the_dataset_is_complete(cluster, complete):
    """Here of the first test's, so that no rank loads a backbone."""
    last = cluster.submit("ddp", "--chain", 2, "--tasks-per-node", 2)
    assert len(cluster.ids) == 2
    cluster.until_ended()
    assert [cluster.state(job)["JobState"] for job in cluster.ids] == ["COMPLETED"] * 2
    assert "0 made now" in cluster.log(last)
    assert complete("ddp")


def test_a_job_that_slurm_did_not_start_so_is_told_in_slurms_words(cluster):
    def refused(*options, job=()):
        done = cluster.run("srun", *options, "madgen", "generate", "job.yaml", "output.dir=refused", *job, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "srun started 1 tasks on a node (--ntasks-per-node=1); set trainer.devices=auto" in refused(
        "-N1", "-n1", job=["trainer.devices=2"]
    )


GUIDE = (ROOT / "slurm/README.md").read_text()
SMALL = "prompts.limit=2 sampling.num_inference_steps=2 sampling.width=256 monitor.wandb.mode=disabled "


def test_every_command_of_the_guide(cluster, conf, tmp_path):
    """In their order; those that want GPUs are only shown to SLURM, which says whether it would take them."""
    for name in ("configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/prompts").symlink_to(ROOT / "jobs/prompts")
    demo = (ROOT / "jobs/demo.yaml").read_text()
    (tmp_path / "jobs/demo.yaml").write_text(demo)
    (tmp_path / "jobs/alps.yaml").write_text("base: demo.yaml\noutput: {dir: out/alps}\n")
    here = Cluster(conf, tmp_path)
    here.env = environment(**{**here.env, "SLURM_CONF": conf})
    lines = re.findall(r"^ {4,6}((?:madgen|sbatch|squeue|scancel|cp) .*)$", GUIDE, re.MULTILINE)
    assert len(lines) > 12
    job, verified = "", False
    for line in lines:
        if "--gpus-per-node" in line:
            script = line.partition(" > ")[0]
            if line.startswith("madgen"):
                shown = here.run("bash", "-c", f"{script} --dry-run".replace("--dry-run --dry-run", "--dry-run"))
                (tmp_path / "rendered.sbatch").write_text(shown.stdout)
                script = "sbatch rendered.sbatch"
            here.run("bash", "-c", script.replace("sbatch ", "sbatch --test-only ", 1))
        elif line.startswith("madgen submit"):
            said = here.run(
                "bash", "-c", line.replace("demo.yaml ", f"demo.yaml {SMALL} trainer.accelerator=cpu ")
            ).stderr
            job = re.findall(r"submitted job (\d+)", said)[0]
            here.ids.append(job)
        else:
            verified = verified or line.startswith("madgen verify")
            if line.startswith("madgen status"):
                here.until_ended(job)
            line = line.replace("generate jobs/alps.yaml ", f"generate jobs/alps.yaml {SMALL} trainer.accelerator=cpu ")
            here.run("bash", "-c", line.replace("1234", job))
    assert verified
    here.until_ended()
    assert here.state(job)["JobState"] == "COMPLETED"
