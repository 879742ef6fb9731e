"""Jobs on a local SLURM of two nodes: DDP, requeue, preemption, lost nodes, time limits, arrays, killed ranks."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from documentation import blocks
from processes import ROOT, begin, environment

from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import read_json
from madgen.dataset.verify import exit_code, verify

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parent / "slurm_local.sh"
TIMEOUT_S = 600
EVERY_PROMPT = "prompts.limit=null"
QUICK = ("sampling.num_inference_steps=3", "method.mad.steps=2", "monitor.wandb.mode=disabled")


@pytest.fixture(scope="module")
def conf():
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("a local SLURM needs root on Debian")
    env = {**os.environ, "SLURM_LOCAL_CPUS": "128", "SLURM_LOCAL_WAIT": "300"}  # enough for the guide's jobs
    with open(Path(tempfile.gettempdir()) / "madgen-slurm-tests", "w", encoding="utf-8") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)  # a concurrent test run would share the cluster and take it down
        up = subprocess.run([SCRIPT, "up"], env=env, capture_output=True, text=True, timeout=600, check=False)
        if up.returncode != 0:
            (pytest.fail if shutil.which("slurmctld") else pytest.skip)(
                f"SLURM does not start here: {up.stderr[-300:]}"
            )
        line = subprocess.run([SCRIPT, "env"], capture_output=True, text=True, check=True).stdout
        yield line.removeprefix("export SLURM_CONF=").strip().strip("'")
        subprocess.run([SCRIPT, "down"], capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory):
    """Write a job of 40 shards with one panorama each; by default it makes 20 of them."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "prompts.txt").write_text("".join(f"mountains over a meadow at noon {i}\n" for i in range(8)))
    (folder / "job.yaml").write_text(
        f"""
backbone: {{pretrained: {json.dumps(str(tiny))}}}
method: {{mad: {{steps: 1}}}}
sampling: {{height: 32, width: 64, num_inference_steps: 30, guidance_scale: 2.0}}
prompts: {{source: prompts.txt, samples_per_prompt: 5, limit: 4}}
output: {{samples_per_shard: 1}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def whole(workplace):
    """Return hashes of the tars that one process writes, by the number of shards: 20, and 40 with `EVERY_PROMPT`."""
    jobs = {"half": (), "whole": (EVERY_PROMPT,)}
    for out, options in jobs.items():
        process = begin(("generate", "job.yaml", f"output.dir={out}", *options), workplace, environment())
        assert process.wait(TIMEOUT_S) == 0, process.said()
    return {len(found): found for found in (hashes(workplace / out) for out in jobs)}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shards/*.tar"))}


class Cluster:
    """`madgen submit` and SLURM's commands, run in `folder`."""

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

    def submit(self, out, *options, job="job.yaml"):
        """Submit a job and return its id."""
        command = [sys.executable, "-m", "madgen", "submit", job, f"output.dir={out}", "--cpus-per-task", 1]
        said = self.run(*command, "--time", 10, *options).stderr
        self.ids += re.findall(r"scancel (.*?)  ", said)[0].split()
        return self.ids[-1]

    def state(self, job):
        """Return JobState, Restarts and the other fields of `scontrol show job`."""
        return dict(pair.split("=", 1) for pair in self.run("scontrol", "-o", "show", "job", job).stdout.split(" ")
                    if "=" in pair)  # fmt: skip

    def until(self, true, what, every_s=0.1):
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := true()):
            assert time.monotonic() < deadline, f"waited for {what}\n{self.logs()}"
            time.sleep(every_s)
        return found

    def made(self, out):
        return len(list((self.folder / out / "shards").glob("*.json")))

    def until_made(self, out, shards=2):
        self.until(lambda: self.made(out) >= shards, f"{shards} shards")

    def until_state(self, job, **wanted):
        """Wait until `scontrol` reports these fields."""
        self.until(lambda: self.state(job).items() >= wanted.items(), f"{wanted}")

    def until_ended(self, *jobs):
        listed = ",".join(jobs or self.ids)

        def ended():
            told = self.run("squeue", "-h", "-j", listed, check=False)  # ended jobs are known for an hour
            return told.returncode == 0 and not told.stdout.strip()

        self.until(ended, "the job's end", 0.5)

    def complete_here(self, out, *options):
        """Complete the dataset with a process outside SLURM."""
        process = begin(("generate", "job.yaml", f"output.dir={out}", *options), self.folder, environment())
        assert process.wait(TIMEOUT_S) == 0, process.said()

    def workers(self, out):
        """Return heartbeats by rank."""
        found = map(read_json, (self.folder / out / "work/workers").glob("*.json"))  # None: it has ended
        return {beat["rank"]: beat for beat in found if beat and "rank" in beat}

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
    """Check that every key exists once, with the bytes of one process."""

    def check(out, shards=20):
        found = verify(DatasetDir(workplace / out))
        assert exit_code(found) == 0, cluster.logs()
        assert hashes(workplace / out) == whole[shards]
        return True

    return check


def test_two_nodes_with_two_tasks_write_the_bytes_of_one_process(cluster, complete):
    job = cluster.submit("ddp", EVERY_PROMPT, "--nodes", 2, "--tasks-per-node", 2)
    seen = {}

    def all_were_seen():
        seen.update({rank: beat["host"] for rank, beat in cluster.workers("ddp").items()})
        return len(seen) == 4

    cluster.until(all_were_seen, "four ranks at work")
    assert sorted(seen) == [0, 1, 2, 3]
    assert set(seen.values()) == {"n1", "n2"}
    cluster.until_ended(job)
    assert cluster.state(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert complete("ddp", 40)


def test_demo_job_on_two_nodes_writes_the_bytes_of_one_process(cluster, workplace):
    """Run the job with fewer panoramas and steps."""
    job = str(ROOT / "jobs/demo.yaml")
    options = ["trainer.accelerator=cpu", "prompts.limit=8", "output.samples_per_shard=1", *QUICK]
    process = begin(("generate", job, "output.dir=demo-alone", *options), workplace, environment())
    assert process.wait(TIMEOUT_S) == 0, process.said()
    number = cluster.submit("demo", *options, "--nodes", 2, "--tasks-per-node", 2, job=job)
    cluster.until_ended(number)
    assert cluster.state(number)["JobState"] == "COMPLETED", cluster.logs()
    assert exit_code(verify(DatasetDir(workplace / "demo"))) == 0
    assert len(hashes(workplace / "demo")) == 8
    assert hashes(workplace / "demo") == hashes(workplace / "demo-alone")


def test_job_resumes_after_requeue_preemption_node_failure_and_scancel(cluster, workplace):
    """Requeue, preempt, take a node down, cancel; then one more job completes the dataset."""
    options = (EVERY_PROMPT, "sampling.num_inference_steps=75")  # long enough for all events
    job = cluster.submit("events", *options, "--nodes", 2, "--partition", "low", "--sbatch=--exclusive")

    def goes_on(restarts):
        cluster.until_state(job, JobState="RUNNING", Restarts=str(restarts))
        cluster.until_made("events", cluster.made("events") + 1)

    goes_on(0)
    cluster.run("scontrol", "requeue", job)
    goes_on(1)

    cluster.run("sbatch", "--partition=main", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    goes_on(2)

    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.until(lambda: cluster.state(job)["JobState"] != "RUNNING", "the job to notice")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume", check=False)  # refused where it is back already
    goes_on(3)

    cluster.run("scancel", job)
    cluster.until_ended(job)
    assert (cluster.state(job)["JobState"], cluster.state(job)["Restarts"]) == ("CANCELLED", "3"), cluster.log(job)
    assert cluster.made("events") < 40
    cluster.until_ended(cluster.submit("events", *options))
    assert exit_code(verify(DatasetDir(workplace / "events"))) == 0, cluster.logs()
    cluster.complete_here("events-alone", *options)
    assert hashes(workplace / "events") == hashes(workplace / "events-alone")


def test_signal_before_the_time_limit_drains_and_requeues_once(cluster, complete):
    """The rank is stopped until the signal arrives, up to 40 s after the limit was set, so it cannot finish first."""
    job = cluster.submit("limit", EVERY_PROMPT, "--sbatch=--signal=B:USR1@80")
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
    assert complete("limit", 40)


def test_job_is_not_requeued_beyond_max_restarts(cluster):
    cluster.env["MADGEN_MAX_RESTARTS"] = "0"
    job = cluster.submit("restarts", EVERY_PROMPT, "sampling.num_inference_steps=75")
    cluster.until_made("restarts", 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until_ended(job)
    state = cluster.state(job)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "3:0"), cluster.log(job)
    assert "not requeued: already restarted 0 times (MADGEN_MAX_RESTARTS)" in cluster.log(job)


def is_pending(process, number):
    """Return whether a signal is pending for a stopped process."""
    masks = re.findall(
        r"^(?:Sig|Shd)Pnd:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(encoding="utf-8"), re.MULTILINE
    )
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def kill(cluster, out, rank):
    """Kill a rank once two shards are finished."""
    cluster.until_made(out)
    beat = cluster.until(lambda: cluster.workers(out).get(rank), f"rank {rank} at work")
    os.kill(beat["pid"], signal.SIGKILL)


def test_shards_of_a_killed_rank_are_taken_over_and_the_rest_of_the_chain_ends_at_once(cluster, complete):
    """Rank 0 takes over the shards of a rank on its node; the next job of the chain finds the dataset complete."""
    last = cluster.submit("killed", EVERY_PROMPT, "--tasks-per-node", 2, "--chain", 2)
    assert len(cluster.ids) == 2
    kill(cluster, "killed", 1)
    cluster.until_ended()
    assert [cluster.state(job)["JobState"] for job in cluster.ids][1] == "COMPLETED"
    assert "; 0 generated in" in cluster.log(last)
    assert "; 0 generated in" not in cluster.log(cluster.ids[0])
    assert complete("killed", 40)


def test_other_ranks_end_when_rank_0_is_killed_and_a_later_process_completes(cluster, complete):
    job = cluster.submit("killed-0", EVERY_PROMPT, "--tasks-per-node", 2)
    kill(cluster, "killed-0", 0)
    cluster.until_ended(job)
    cluster.complete_here("killed-0", EVERY_PROMPT)
    assert complete("killed-0", 40)


def test_kill_on_bad_exit_ends_the_job_and_a_later_process_completes(cluster, complete, workplace):
    script = workplace / "kill.sbatch"
    script.write_text(
        f"#!/bin/bash\nsrun --kill-on-bad-exit=1 madgen generate job.yaml output.dir=bad-exit {EVERY_PROMPT}\n"
    )
    options = ["--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", "--output=job-%j.log"]
    job = cluster.run("sbatch", *options, script).stdout.strip()
    cluster.ids.append(job)
    kill(cluster, "bad-exit", 1)
    cluster.until_ended(job)
    assert cluster.state(job)["JobState"] == "FAILED"
    cluster.complete_here("bad-exit", EVERY_PROMPT)
    assert complete("bad-exit", 40)


def test_array_completes_after_a_cancelled_task(cluster, complete):
    array = cluster.submit("array", "--array", "0-7%2")
    cluster.until_made("array", 1)
    cluster.run("scancel", f"{array}_1", check=False)  # refused where it has ended already
    more = cluster.submit("array", "--array", "0-1")
    cluster.until_ended(array, more)
    assert complete("array")


def test_task_count_mismatch_names_the_srun_option(cluster):
    def refused(*options, job=()):
        done = cluster.run("srun", *options, "madgen", "generate", "job.yaml", "output.dir=refused", *job, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "srun started 1 tasks per node (--ntasks-per-node=1); set trainer.devices=auto" in refused(
        "-N1", "-n1", job=["trainer.devices=2"]
    )


GUIDE = ROOT / "docs/slurm.md"
SCORES = "--metrics clip_score"
SMALL = "prompts.limit=2 sampling.num_inference_steps=2 sampling.width=256 monitor.wandb.mode=disabled "


def test_commands_of_the_slurm_guide_run(cluster, conf, tmp_path):
    """In their order; jobs with GPUs are only tested with `sbatch --test-only`."""
    for name in ("configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/prompts").symlink_to(ROOT / "jobs/prompts")
    demo = (ROOT / "jobs/demo.yaml").read_text()
    (tmp_path / "jobs/demo.yaml").write_text(demo)
    (tmp_path / "jobs/alps.yaml").write_text("base: demo.yaml\noutput: {dir: out/alps}\n")
    here = Cluster(conf, tmp_path)
    here.env = environment(**{**here.env, "SLURM_CONF": conf})
    lines = [line for block in blocks(GUIDE, "bash") if not block.note for line in block.commands]
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
            if "evaluate.sbatch" in line:
                evaluation = line.replace("--gpus-per-node 1 ", "--parsable ").replace("out/alps", f"out/demo {SCORES}")
                number = here.run("bash", "-c", evaluation).stdout.strip()
                here.until_ended(number)
                said = (tmp_path / f"madgen-evaluate-{number}.log").read_text()
                assert here.state(number)["JobState"] == "COMPLETED", said
                assert json.loads((tmp_path / "out/demo/report/report.json").read_text())["metrics"]["clip_score"]
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
