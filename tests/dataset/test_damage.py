"""Damaged files: every changed byte that a reader would notice is found, and no command ends with a traceback."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from forks import WAIT_S
from mutations import mutate
from plans import table_of, tasks_of
from processes import begin, environment
from pyarrow import parquet

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.filtering.filter import write_filtered
from madgen.dataset.filtering.selection import Choice, parse
from madgen.dataset.format import FormatError, Manifest, Sidecar
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.sample_json import sample_metadata, sample_settings
from madgen.dataset.shards.leases import LEASE_S, Worker
from madgen.dataset.shards.recovery import reopen, salvage
from madgen.dataset.shards.writer import OpenShard
from madgen.dataset.verify import verify
from madgen.monitoring.status import status
from madgen.types import Prompt, Record
from madgen.utils.atomic import temporary_path
from madgen.utils.errors import UserError

PLAN = Plan("job", table_of(Prompt(f"p{i}", f"text {i}", "", 8, 16) for i in range(4)), 1, 2, 0)


def make(root):
    """Write a complete dataset of 4 samples in 2 shards without sampling."""
    directory, job = DatasetDir(root), load_job([], ["name=job", "output.samples_per_shard=2"])
    content = manifest.manifest(job, PLAN, job_identity(job, PLAN, "float32", WeightIds("w")))
    manifest.create(directory, content)
    settings = sample_settings(job, content)
    for index in range(PLAN.shard_count):
        shard = OpenShard(directory, PLAN.shard(index), "w")
        for position, task in enumerate(shard.shard.tasks):
            image = np.random.default_rng(task.seed).integers(0, 255, (8, 16, 3), dtype=np.uint8)
            metadata = {**sample_metadata(task, settings), "scores": {"seam": 1.5, "coherence": 0.25}}
            shard.add(position, encode_sample(Record(task, image, metadata), "png", 95), metadata["scores"])
        shard.publish()
    write_index(directory)
    shutil.rmtree(directory.work)
    return directory


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "out")


def reader_view(path):
    """Return what a reader gets from a file; None if it cannot be read."""
    data = path.read_bytes()
    try:
        if path.suffix == ".tar":
            return data  # none of its bytes is free
        if path.suffix == ".parquet":
            table = parquet.read_table(path, use_threads=False)
            return table.schema.names, table.to_pylist()
        if path.name == "dataset.json":
            content = Manifest.from_json(data, path)
            return content.fingerprint, content.identity, content.plan, content.filtered, content.name
        sidecar = Sidecar.from_json(data, path)
        return sidecar.shard, sidecar.index, sidecar.samples, sidecar.quarantine
    except (FormatError, pyarrow.ArrowException, OSError, ValueError):
        return None


def is_noticed(dataset):
    try:
        return bool(verify(dataset).problems)
    except UserError:
        return True


@pytest.mark.parametrize("flips", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_verify_notices_every_byte_that_a_reader_would(dataset, flips):
    """Change random bytes of tars, sidecars, `dataset.json` and index, each file as often as the others."""
    rng, missed, visible = random.Random(18), [], 0
    files = sorted([*dataset.shards.iterdir(), dataset.manifest, dataset.root / "index.parquet"])
    before = {path: (path.read_bytes(), reader_view(path)) for path in files}
    assert not is_noticed(dataset)
    for number in range(flips):
        path = files[number % len(files)]
        data, view = before[path]
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
        if reader_view(path) != view:
            visible += 1
            missed += [] if is_noticed(dataset) else [(path.name, at)]
        path.write_bytes(data)
    assert missed == []
    assert visible > flips // 3


COMMANDS = [
    ("verify", "out"),
    ("status", "out", "--json"),
    ("index", "out"),
    ("filter", "out", "--where", "seed >= 0", "--keys", "keys.txt"),
    ("filter", "out", "--where", "seam > 0", "-o", "chosen"),
]


def damaged(dataset, rng, kind):
    """Damage one file of a kind, as a file of a running dataset where it exists there alone; return its name."""
    paths = {"manifest": [dataset.manifest], "sidecar": sorted(dataset.shards.glob("*.json"))}
    if kind not in paths:
        reopen(dataset, "job-000001", dataset.read_sidecar("job-000001").samples[:1])
        worker = Worker(dataset)
        worker.start()
        assert worker.claim("job-000001")
        worker._stop.set()
        worker._thread.join()
        folder = {"journal": dataset.open_shards, "heartbeat": dataset.workers, "claim": dataset.claims}[kind]
        paths[kind] = sorted(folder.glob("*.json*"))
    path = rng.choice(paths[kind])
    path.write_bytes(mutate(path.read_bytes(), rng))
    return path.name


@pytest.mark.parametrize("kind", ["manifest", "sidecar", "journal", "heartbeat", "claim"])
@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_damaged_files_end_no_command_with_a_traceback(madgen_here, tmp_path, kind, rounds):
    made = make(tmp_path / "made").root
    for seed in range(rounds):
        for name in ("out", "chosen"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / "keys.txt").unlink(missing_ok=True)
        shutil.copytree(made, tmp_path / "out")
        where = damaged(DatasetDir(tmp_path / "out"), random.Random(f"{kind} {seed}"), kind)
        for command in (*COMMANDS, ("push", "out", (tmp_path / f"there{seed}").as_uri())):
            result = madgen_here(*command)
            assert result.code in (0, 2, 3, 4) or (result.code, command[0]) == (1, "verify"), (seed, where, command)
            assert result.code != 2 or len(result.err.splitlines()) == 1, (seed, where, command, result.err)


@pytest.mark.parametrize("content", [b"[]", b"5", b"", b'{"fingerprint": ', b"\xff\xfe", b"null"])
def test_target_with_a_damaged_dataset_json_is_refused(dataset, madgen_here, tmp_path, content):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/dataset.json").write_bytes(content)
    result = madgen_here("push", "out", (tmp_path / "there").as_uri())
    assert (result.code, "there/dataset.json is damaged" in result.err) == (2, True), result.err
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["dataset.json"]


def test_target_that_is_a_file_is_refused(dataset, madgen_here, tmp_path):
    (tmp_path / "there").write_text("mine", encoding="utf-8")
    result = madgen_here("push", "out", (tmp_path / "there").as_uri())
    assert (result.code, "is a file" in result.err) == (2, True), result.err
    assert (tmp_path / "there").read_text(encoding="utf-8") == "mine"


def test_bad_journal_line_is_dropped_and_the_others_are_kept(dataset):
    reopen(dataset, "job-000000", dataset.read_sidecar("job-000000").samples)
    (journal,) = dataset.open_shards.glob("*.jsonl")
    first, second = journal.read_bytes().splitlines()
    for offset in (10**30, -1, "x", None):
        broken = json.dumps({**json.loads(first), "offset": offset}).encode()
        journal.write_bytes(broken + b"\n" + second + b"\n")
        assert list(salvage(dataset, PLAN.shard(0)).kept) == [1]


def test_samples_of_another_plan_are_not_recovered(dataset):
    """A journal that vouches for intact records is not enough: they must be those of the task."""
    other = Plan("job", table_of(Prompt(f"p{i}", f"other {i}", "", 8, 16) for i in range(4)), 1, 2, 0)
    reopen(dataset, "job-000000", dataset.read_sidecar("job-000000").samples)
    assert list(salvage(dataset, PLAN.shard(0)).kept) == [0, 1]
    assert salvage(dataset, other.shard(0)).kept == {}


def test_unreadable_heartbeat_of_another_user_stops_nobody(dataset, monkeypatch):
    """Its worker is alive as long as the file is renewed; `status` leaves it out."""
    from madgen.dataset.shards import leases

    other, mine = Worker(dataset), Worker(dataset)
    reopen(dataset, "job-000001", [])
    other.start()
    assert other.claim("job-000001")
    mine.start()
    read = leases.read_file

    def denied(path):
        if path == other.heartbeat_file:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(leases, "read_file", denied)
    try:
        assert not mine.claim("job-000001")
        assert mine.is_alive(other.id, mine._claim_file("job-000001"))
        assert [worker["id"] for worker in status(dataset)["workers"]] == [mine.id]
        mine.lease_s = -LEASE_S
        assert mine.claim("job-000001")
    finally:
        other.close()
        mine.close()


def test_filter_removes_the_copies_of_killed_processes(dataset, tmp_path):
    script = "import sys, pathlib, madgen.utils.atomic as f; print(f.temporary_path(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path / "chosen")]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.strip()
    alive = temporary_path(tmp_path / "chosen")
    for folder in (tmp_path / ended, alive):
        (folder / "shards").mkdir(parents=True)
        (folder / "shards/job-000000.tar").write_bytes(b"half")
    (tmp_path / ".mine").mkdir()
    write_filtered(dataset, Choice(parse("seam > 0")), tmp_path / "another")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", "another", ".mine", alive.name])
    assert verify(DatasetDir(tmp_path / "another")).complete


@pytest.mark.parametrize("command", ["verify", "status"])
def test_closed_pipe_is_no_failure_of_the_dataset(dataset, tmp_path, command):
    process = subprocess.Popen(
        [sys.executable, "-c", "from madgen.cli.app import main; main()", command, "out"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert (process.wait(WAIT_S), process.stderr.read()) == (0 if command == "verify" else 3, b"")


def test_seeds_of_64_bits_are_indexed_and_selected(tmp_path):
    plan = Plan("job", table_of([Prompt("p", "text", "", 8, 16, seed=2**64 - 1)]), 1, 2, 0)
    assert tasks_of(plan)[0].seed == 2**64 - 1
    directory, job = DatasetDir(tmp_path / "out"), load_job([], ["name=job", "output.samples_per_shard=2"])
    content = manifest.manifest(job, plan, job_identity(job, plan, "float32", WeightIds("w")))
    manifest.create(directory, content)
    shard = OpenShard(directory, plan.shard(0), "w")
    record = Record(tasks_of(plan)[0], np.zeros((8, 16, 3), np.uint8), sample_metadata(tasks_of(plan)[0], {}))
    shard.add(0, encode_sample(record, "png", 95))
    shard.publish()
    index = parquet.read_table(write_index(directory))
    assert index["seed"].to_pylist() == [2**64 - 1]
    shutil.rmtree(directory.work)
    assert verify(directory).complete


def test_paths_are_not_in_samples_nor_in_the_card(job_file, tiny, tmp_path):
    """The same weights in another folder give the same bytes, which name neither folder."""
    shutil.copytree(tiny, tmp_path / "copy")
    for name in ("out", "again"):
        changes = [] if name == "out" else [f"backbone.pretrained={tmp_path}/copy"]
        process = begin(("generate", job_file, f"output.dir={name}", *changes), tmp_path, environment())
        assert process.wait() == 0, process.output()
    for path in sorted((tmp_path / "out/shards").glob("*.tar")):
        data = path.read_bytes()
        assert data == (tmp_path / "again/shards" / path.name).read_bytes()
        assert str(tiny).encode() not in data
    for name in ("out", "again"):
        assert str(tmp_path) not in (tmp_path / name / "README.md").read_text(encoding="utf-8")


def test_scores_that_are_large_integers_are_indexed(dataset):
    path = dataset.sidecar("job-000000")
    content = json.loads(path.read_bytes())
    content["samples"][0]["scores"]["seam"] = 10**30
    path.write_text(json.dumps(content), encoding="utf-8")
    assert parquet.read_table(write_index(dataset))["seam"].to_pylist()[0] == 1e30
    assert not verify(dataset).complete


@pytest.mark.parametrize("name", ["index.parquet", "README.md", "quarantine.jsonl"])
def test_a_directory_in_place_of_a_derived_file_is_named(dataset, madgen_here, tmp_path, name):
    """`index` and `push` refuse it in one line; `verify --repair` moves it aside."""
    (dataset.root / name).unlink(missing_ok=True)
    (dataset.root / name).mkdir()
    for command in (("index", "out"), ("push", "out", (tmp_path / "there").as_uri())):
        result = madgen_here(*command)
        assert (result.code, len(result.err.splitlines()), name in result.err) == (2, 1, True), (command, result.err)
    assert madgen_here("verify", "out", "--repair").code == 1
    assert verify(dataset).complete


def test_an_unreadable_shard_does_not_put_the_blame_on_others(dataset, madgen_here, monkeypatch):
    """`--repair` reopens none of them: what the unreadable one holds is unknown, not missing."""
    read = DatasetDir.read_sidecar

    def denied(self, name):
        if name == "job-000001":
            raise PermissionError(13, "Permission denied", str(self.sidecar(name)))
        return read(self, name)

    monkeypatch.setattr(DatasetDir, "read_sidecar", denied)
    verdict = verify(dataset)
    assert (verdict.broken, verdict.present) == ({}, 2)
    assert verdict.problems == [
        f"job-000001: it cannot be read: [Errno 13] Permission denied: '{dataset.sidecar('job-000001')}'"
    ]
    assert madgen_here("verify", "out", "--repair").code == 1
    assert dataset.done() == {"job-000000", "job-000001"}


@pytest.mark.parametrize(
    "name",
    ["open/job-000001.w.jsonl", "open/job-000001.w.tar", "workers/w.json", "claims/job-000001.json", "plan/x.arrow"],
)
def test_no_command_waits_for_a_pipe_in_work(dataset, madgen_here, tmp_path, name):
    for path in (dataset.tar("job-000001"), dataset.sidecar("job-000001")):
        path.unlink()
    path = dataset.work / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    if path.suffix == ".tar":
        line = {"key": tasks_of(PLAN)[2].key, "offset": 0, "size": 512, "sha256": "0"}
        path.with_suffix(".jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    for command in (*COMMANDS[:3], ("preview", "out"), ("filter", "out", "--where", "seam > 0", "-o", "chosen")):
        assert madgen_here(*command).code == (3 if command[0] == "verify" else 0), command
    worker = Worker(dataset)
    worker.start()
    try:
        worker.claim("job-000001")
        assert salvage(dataset, PLAN.shard(1)).kept == {}
    finally:
        worker.close()


REPAIRED = [
    ("samples", "file"),
    ("shards/job-000001.json", "broken link"),
    ("shards/job-000001.tar", "loop"),
    ("shards/job-000001.tar", "doubled"),
    ("shards/job-000001.tar", "pipe"),
]


@pytest.mark.parametrize(("name", "kind"), REPAIRED)
def test_other_kinds_of_files_are_named_and_repaired(dataset, madgen_here, tmp_path, name, kind):
    path = dataset.root / name
    content = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    {"file": lambda: path.write_bytes(b"x"), "broken link": lambda: path.symlink_to("nowhere"),
     "loop": lambda: path.symlink_to(path.name), "doubled": lambda: path.write_bytes(2 * content),
     "pipe": lambda: os.mkfifo(path)}[kind]()  # fmt: skip
    assert madgen_here("verify", "out").code == 1
    refused = "index" if name == "samples" else "push"
    command = (refused, "out") if refused == "index" else (refused, "out", (tmp_path / "there").as_uri())
    result = madgen_here(*command)
    assert (result.code, len(result.err.splitlines()), path.name in result.err) == (2, 1, True), result.err
    assert madgen_here("verify", "out", "--repair").code == 1
    verdict = verify(dataset)
    assert (verdict.problems, verdict.present + verdict.kept) == ([], 4 if kind in ("file", "doubled") else 2)


OTHER_KINDS = [
    (name, kind)
    for name in ("shards/job-000001.tar", "shards/job-000001.json", "index.parquet", "README.md", "samples", "work")
    for kind in ("directory", "pipe", "broken link", "loop")
    if (name, kind) not in {("samples", "directory"), ("work", "directory")}
]


@pytest.mark.parametrize(("name", "kind"), OTHER_KINDS)
def test_generate_names_other_kinds_of_files_in_a_complete_dataset(job_file, finished, madgen_here, name, kind):
    path = finished / name
    if os.path.lexists(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "broken link": lambda: path.symlink_to("nowhere"),
     "loop": lambda: path.symlink_to(path.name)}[kind]()  # fmt: skip
    before = sorted(finished.rglob("*"))
    for command in ("plan", "generate"):
        result = madgen_here(command, job_file)
        assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1), (result.err, result.out)
        kind_of_file = ("is not a directory", "is not a regular file", "is a link that leads to no file")
        assert f"out/{name} " in result.err
        assert any(text in result.err for text in kind_of_file), result.err
    assert sorted(finished.rglob("*")) == before


def test_links_to_files_of_a_complete_dataset_are_accepted(job_file, finished, madgen_here, tmp_path):
    for name in ("shards/job-000001.tar", "index.parquet"):
        (finished / name).rename(tmp_path / "moved")
        (finished / name).symlink_to((tmp_path / "moved").rename(tmp_path / name.rpartition("/")[2]))
    assert madgen_here("generate", job_file).code == 0


def test_shards_that_are_a_file_are_named(dataset, madgen_here, tmp_path):
    shutil.rmtree(dataset.shards)
    dataset.shards.write_bytes(b"x")
    for command in (*COMMANDS[:3], ("push", "out", (tmp_path / "there").as_uri())):
        result = madgen_here(*command)
        assert result.code == (1 if command[0] == "verify" else 2), (command, result.err)
        assert "out/shards is not a directory" in result.out + result.err
