"""A dataset that grows, from the command line: killed, shared by workers of two generations, pushed and verified."""

import json
import os
import signal
from collections import Counter
from hashlib import sha256
from pathlib import Path

import datasets
import pytest
from processes import MADGEN, Forked, environment, until

from madgen import load_job
from madgen.dataset import manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import read_file
from madgen.planning.resolved_run import ResolvedRun

STOP_AFTER_TWO = f"""
import os, signal
from madgen.dataset.shards.writer import OpenShard
commit, commits = OpenShard.commit, []
def commit_and_stop(*arguments, **options):
    commit(*arguments, **options)
    commits.append(1)
    if len(commits) == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
OpenShard.commit = commit_and_stop
{MADGEN}"""
"""`madgen`, in a process that stops itself once two batches are written."""
EXTEND = "output.resume=extend"


def started(folder, *arguments, program=MADGEN):
    return Forked(("generate", folder / "job.yaml", *arguments), folder, environment(), program)


def run(folder, *arguments, code=0):
    process = started(folder, *arguments)
    assert process.wait() == code, process.output()
    return process


def add_prompts(folder, *texts, at=None):
    """Insert prompts into the prompt file, by default at the end."""
    path = folder / "prompts.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    at = len(lines) if at is None else at
    path.write_text("".join(f"{line}\n" for line in (*lines[:at], *texts, *lines[at:])), encoding="utf-8")


def tars(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "shards").glob("*.tar"))}


def keys(folder):
    return [entry.key for entry in DatasetDir(folder).entries()]


def is_stopped(process):
    return "State:\tT" in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")


def load(folder, cache):
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))


def test_new_prompts_need_resume_extend(madgen_here, job_file, finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    add_prompts(tmp_path, "a lake")
    for more in ((), ("prompts.samples_per_prompt=3",)):
        result = madgen_here("generate", job_file, *more)
        assert result.code == 2
        assert "set output.resume=extend to add prompts or samples to it" in result.err
        assert result.err.count("\n") == 1
    for more in (["prompts.samples_per_prompt=1"], ["method.mad.steps=2"], ["sampling.width=96"], ["prompts.limit=4"]):
        result = madgen_here("generate", job_file, EXTEND, *more)
        planned = madgen_here("plan", job_file, EXTEND, *more)
        assert (result.code, planned.code, planned.err) == (2, 2, result.err), more
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    planned = madgen_here("plan", job_file, EXTEND)
    assert "6 prompts, 12 panoramas in 5 shards" in planned.out
    assert "to out: adds 2 panoramas, as generation 2" in planned.out
    assert json.loads(madgen_here("plan", job_file, EXTEND, "--json").out)["samples_added"] == 2


@pytest.mark.parametrize("finished", [True, False])
def test_changed_prompts_are_named_by_their_text(madgen_here, job_file, tmp_path, finished):
    """Ids of prompts of a text file are hashes. `extend` is not proposed where it would be refused as well."""
    if finished:
        assert madgen_here("generate", job_file).code == 0
    else:
        run = ResolvedRun.of(load_job(job_file, [f"output.dir={tmp_path}/out"])).on("cpu")
        manifest.create(run.directory, run.manifest)
        run.directory.make_in_work(run.directory.plans)
        run.plan.save(run.directory.plans)
    lines = (tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    lines[2] = "a red hut"
    (tmp_path / "prompts.txt").write_text("\n".join([*lines, "a lake"]), encoding="utf-8")
    named = "its prompt 'mountains over a meadow at noon 2' is not among the prompts of the job"
    for words in ((job_file,), (job_file, EXTEND)):
        for command in ("plan", "generate"):
            refused = madgen_here(command, *words)
            assert (refused.code, refused.err.count("\n")) == (2, 1)
            assert f"output.resume=extend only adds to it, and {named}; choose another output.dir" in refused.err


def test_changed_text_of_an_id_is_named(madgen_here, job_file, tmp_path):
    source = "prompts.source=p.csv"
    (tmp_path / "p.csv").write_text("id,prompt\na,a hill\nb,a lake\n", encoding="utf-8")
    assert madgen_here("generate", job_file, source, "prompts.samples_per_prompt=1").code == 0
    (tmp_path / "p.csv").write_text("id,prompt\na,a hill\nb,a pond\nc,a tree\n", encoding="utf-8")
    refused = madgen_here("plan", job_file, source, "prompts.samples_per_prompt=1")
    assert "its prompt 'a lake' (id b) is 'a pond' in the job; choose another output.dir" in refused.err


@pytest.mark.slow
def test_dataset_grown_by_a_tenth_killed_and_finished_by_others(job_file, tmp_path, madgen_here):
    """Old shards keep their bytes, every key is there once, and every reader sees one dataset."""
    add_prompts(tmp_path, *(f"a lake {number}" for number in range(5)))
    out, remote = tmp_path / "out", tmp_path / "remote"
    run(tmp_path, f"output.upload={remote.as_uri()}")
    old = tars(out)
    add_prompts(tmp_path, "a new fjord", at=3)  # between the old ones
    process = started(tmp_path, EXTEND, "prompts.samples_per_prompt=3", program=STOP_AFTER_TWO)
    until(lambda: is_stopped(process), "two batches")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    assert madgen_here("verify", out).code == 3
    state = json.loads(madgen_here("status", out, "--json").out)
    assert (state["planned"], state["done"] >= 20, state["complete"]) == (33, True, False)
    assert madgen_here("push", out, remote.as_uri()).code == 3

    both = [started(tmp_path, EXTEND, "prompts.samples_per_prompt=3") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.output() for process in both]
    assert {name: tars(out)[name] for name in old} == old
    assert max(Counter(keys(out)).values()) == 1
    assert len(keys(out)) == 33
    verdict = madgen_here("verify", out)
    assert (verdict.code, verdict.out) == (0, "33 of 33 panoramas present: as planned\n")
    loaded = load(out, tmp_path / "cache")
    assert sorted(loaded["__key__"]) == sorted(keys(out))
    card = read_file(out / "README.md").decode()
    assert "33 of 33 synthetic panoramas" in card
    assert "| generations | 20 + 13 panoramas |" in card
    assert madgen_here("index", out).code == 0
    assert madgen_here("push", out, remote.as_uri()).code == 0
    assert tars(remote) == tars(out)
    assert madgen_here("verify", remote).code == 0
    assert madgen_here("generate", job_file, EXTEND, "prompts.samples_per_prompt=3").code == 0  # nothing left

    last = keys(out)[-1]
    assert madgen_here("regenerate", out, last, "-o", tmp_path / "again.png").code == 0
    name = sorted(old)[0].removesuffix(".tar")
    (out / "shards" / f"{name}.tar").write_bytes(b"")
    assert madgen_here("verify", out, "--repair").code == 1
    assert madgen_here("generate", job_file, EXTEND, "prompts.samples_per_prompt=3").code == 0
    assert {name: tars(out)[name] for name in old} == old
    assert madgen_here("verify", out).code == 0


@pytest.mark.slow
def test_workers_of_both_generations_share_a_dataset(job_file, tmp_path, madgen_here):
    """The old run is stopped while the dataset grows, goes on, and ends with the shards that it planned."""
    out = tmp_path / "out"
    old = started(tmp_path, program=STOP_AFTER_TWO)
    until(lambda: is_stopped(old), "two batches")
    add_prompts(tmp_path, "a lake", "a hut", at=2)
    new = started(tmp_path, EXTEND)
    until(lambda: json.loads(read_file(out / "dataset.json")).get("generations"), "the next generation")
    old.send_signal(signal.SIGCONT)
    assert [old.wait(), new.wait()] == [0, 0], [old.output(), new.output()]
    assert max(Counter(keys(out)).values()) == 1
    assert len(keys(out)) == 14
    assert madgen_here("verify", out).code == 0

    apart = tmp_path / "apart"
    apart.mkdir()
    os.link(job_file, apart / "job.yaml")
    (apart / "prompts.txt").write_text((tmp_path / "prompts.txt").read_text(encoding="utf-8"), encoding="utf-8")
    lines = (tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    (apart / "prompts.txt").write_text("".join(f"{line}\n" for line in (*lines[:2], *lines[4:])), encoding="utf-8")
    run(apart, f"output.dir={tmp_path / 'one'}")
    for name, digest in tars(tmp_path / "one").items():
        assert tars(out)[name] == digest, "a shard of the first generation depends on who made it"


def test_grown_dataset_is_verified_in_all_generations(job_file, finished, tmp_path, madgen_here):
    """A sample of a later generation is compared with the prompt and seed of its first generation."""
    assert madgen_here("generate", job_file, EXTEND, "prompts.samples_per_prompt=3").code == 0
    directory = DatasetDir(tmp_path / "out")
    content = json.loads(read_file(directory.manifest))
    for change in (
        lambda content: content["generations"][0].update(samples=9),
        lambda content: content["generations"][0].update(shards=3),
        lambda content: content["generations"][1].update(prompts=1),
        lambda content: content["generations"][0].update(prompts_digest="0" * 32),
        lambda content: content["generations"].pop(0),
        lambda content: content.pop("generations"),
        lambda content: content["generations"].reverse(),
    ):
        damaged = json.loads(json.dumps(content))
        change(damaged)
        directory.manifest.write_text(json.dumps(damaged), encoding="utf-8")
        assert madgen_here("verify", tmp_path / "out").code == 1
    directory.manifest.write_text(json.dumps(content), encoding="utf-8")
    assert madgen_here("verify", tmp_path / "out").code == 0
