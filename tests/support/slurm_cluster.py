"""`madgen submit` and the commands of SLURM, run in a folder."""

import hashlib
import os
import re
import subprocess
import time

from forks import programs
from processes import begin, environment

from madgen.dataset.records import parse_object
from madgen.dataset.shards.leases import read_shared

TIMEOUT_S = 600


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shards/*.tar"))}


class Cluster:
    """`madgen submit` and SLURM's commands, run in `folder`; `madgen` is the one in the folder `path`."""

    def __init__(self, conf, folder, path=None):
        self.folder = folder
        self.env = environment(SLURM_CONF=conf, PATH=f"{path or programs()}:{os.environ['PATH']}")
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
        command = ["madgen", "submit", job, f"output.dir={out}", "--cpus-per-task", 1]
        said = self.run(*command, "--time", 10, *options).stderr
        self.ids += re.findall(r"scancel (.*?)  ", said)[0].split()
        return self.ids[-1]

    def state(self, job):
        """Return JobState, Restarts and the other fields of `scontrol show job`."""
        return dict(pair.split("=", 1) for pair in self.run("scontrol", "-o", "show", "job", job).stdout.split(" ")
                    if "=" in pair)  # fmt: skip

    def until(self, true, what, every_s=0.1, jobs=()):
        """Return the first true value of `true()`; fail if these jobs, by default all, end before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := true()):
            assert time.monotonic() < deadline, f"waited for {what}\n{self.logs()}"
            assert self.queued(*jobs) or true(), f"the jobs ended before {what}\n{self.logs()}"
            time.sleep(every_s)
        return value

    def queued(self, *jobs):
        """Return whether one of these jobs, by default of all, has not ended."""
        done = self.run("squeue", "-h", "-j", ",".join(jobs or self.ids), check=False)  # knows ended jobs for an hour
        return done.returncode != 0 or bool(done.stdout.strip())

    def made(self, out):
        return len(list((self.folder / out / "shards").glob("*.json")))

    def until_made(self, out, shards=2):
        self.until(lambda: self.made(out) >= shards, f"{shards} shards")

    def until_state(self, job, **wanted):
        """Wait until `scontrol` reports these fields."""
        self.until(lambda: self.state(job).items() >= wanted.items(), f"{wanted}")

    def until_ended(self, *jobs):
        self.until(lambda: not self.queued(*jobs), "the job's end", 0.5, jobs)

    def complete_here(self, out, *options):
        """Complete the dataset with a process outside SLURM."""
        process = begin(("generate", "job.yaml", f"output.dir={out}", *options), self.folder, environment())
        assert process.wait(TIMEOUT_S) == 0, process.output()

    def workers(self, out):
        """Return heartbeats by rank."""
        beats = (self.folder / out / "work/workers").glob("*.json")
        found = (read_shared(parse_object, path) for path in beats)  # None: it has ended
        return {beat["rank"]: beat for beat in found if beat and "rank" in beat}

    def log(self, job):
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob(f"job-{job}*.log")))

    def logs(self):
        return "\n".join(f"== {job}\n{self.log(job)}" for job in self.ids) + self.run("squeue", check=False).stdout
