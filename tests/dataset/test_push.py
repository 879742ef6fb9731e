"""Uploads to a failing S3 server over HTTP and to a folder, and errors."""

import base64
import hashlib
import json
import subprocess
import threading

import numpy as np
import pytest
from plans import table_of
from s3_server import KEYS, objects, s3_server

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.remote import background
from madgen.dataset.remote import filesystem as upload
from madgen.dataset.remote import push as pushing
from madgen.dataset.remote.background import BackgroundUpload
from madgen.dataset.remote.filesystem import Remote
from madgen.dataset.remote.push import Push, push
from madgen.dataset.shards.writer import OpenShard
from madgen.types import Prompt, Record
from madgen.utils.errors import UserError

PLAN = Plan("job", table_of((Prompt(f"p{i}", f"hills {i}", "", 16, 32) for i in range(16)), 1), 1, 2, 0)


def publish(directory, index):
    shard = OpenShard(directory, PLAN.shard(index), "w")
    for position, task in enumerate(shard.shard.tasks):
        image = np.random.default_rng(task.seed).integers(0, 255, (16, 32, 3), dtype=np.uint8)
        about = {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 16, "width": 32}
        shard.add(position, encode_sample(Record(task, image, about), "png", 95))
    shard.publish()


@pytest.fixture
def make(tmp_path):
    """A dataset, of some of its 8 shards."""

    def make(shards=range(8), folder="out", **changes):
        directory, job = DatasetDir(tmp_path / folder), load_job([], ["name=job"])
        identity = job_identity(job, PLAN, "float32", WeightIds("w")) | changes
        manifest.create(directory, manifest.manifest(job, PLAN, identity))
        for index in shards:
            publish(directory, index)
        if len(shards) == 8:
            write_index(directory)
        return directory

    return make


def files(directory, prefix=""):
    found = (path for path in directory.root.rglob("*") if path.is_file() and "work" not in path.parts)
    return {f"{prefix}{path.relative_to(directory.root)}": path.read_bytes() for path in found}


@pytest.fixture
def s3(monkeypatch):
    with s3_server(monkeypatch) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    for name in ("FIRST_S", "LONGEST_S"):
        monkeypatch.setattr(pushing, name, 0.01)
    monkeypatch.setattr(background, "PAUSE_S", 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_object_is_uploaded_once_despite_failures(s3, make, impatient, seed):
    directory = make()
    s3.share, s3.random = 0.3, type(s3.random)(seed)
    pushed = push(directory, "s3://bucket/set/")
    s3.share = 0.0
    assert pushed.complete, pushed.trouble
    assert objects() == files(directory, "set/")
    assert set(s3.failed) == {"error", "cut", "stored cut", "lost answer", "cut answer"}
    last = {key: max(at for at, other in enumerate(s3.stored) if other == key) for key in s3.stored}
    for index in range(8):
        tar, sidecar = (f"/bucket/set/shards/job-{index:06d}.{suffix}" for suffix in ("tar", "json"))
        assert last[tar] < s3.stored.index(sidecar) < last["/bucket/set/dataset.json"]
    s3.stored.clear()
    again = push(directory, "s3://bucket/set")
    assert (again.sent, again.complete, s3.stored) == (0, True, []), "nothing is sent again"


def test_published_shards_upload_in_the_background_and_errors_are_raised_at_the_end(s3, make, impatient, capfd):
    directory = make(range(3))
    uploads = BackgroundUpload(directory, "s3://bucket/set")
    s3.share = 1.0
    uploads.start(sweep=True)
    publish(directory, 3)
    uploads.add("job-000003")
    assert s3.stored == []
    s3.share = 0.2
    uploads.finish(lambda: False)
    s3.share = 0.0
    sent = push(directory, "s3://bucket/set")
    assert (sent.complete, sent.shards_left) == (False, 4)
    assert objects() == {key: data for key, data in files(directory, "set/").items() if "/shards/" in key}
    assert threading.active_count() < 20
    secret = KEYS["AWS_SECRET_ACCESS_KEY"]
    assert secret not in "".join(capfd.readouterr())


def test_multipart_uploads_are_checked_by_their_etag(s3, tmp_path, monkeypatch):
    part = 5 * 2**20
    monkeypatch.setattr(upload, "PART", part)
    monkeypatch.setitem(upload.OPTIONS, "s3", {"chunksize": part, "max_concurrency": 2})
    monkeypatch.setattr(upload.md5_of_parts, "__defaults__", (part,))
    path = tmp_path / "large.tar"
    path.write_bytes(np.random.default_rng(0).bytes(12 * 2**20))
    remote = Remote("s3://bucket")
    remote.put(path, "large.tar")
    info = remote.info("large.tar")
    assert info["ETag"].strip('"').endswith("-3")
    assert remote.same(path, "large.tar", info) == "ETag"
    with open(path, "r+b") as stream:
        stream.write(b"other")
    assert remote.same(path, "large.tar", info) is None


def test_regenerated_shard_replaces_the_old_one(make, tmp_path):
    directory, there = make(), tmp_path / "there"
    assert push(directory, there.as_uri()).verified.keys() == {"reading back"}
    assert files(DatasetDir(there)) == files(directory)
    sidecar = json.loads(directory.sidecar("job-000002").read_text(encoding="utf-8"))
    directory.sidecar("job-000002").write_text(json.dumps({**sidecar, "samples": []}), encoding="utf-8")
    directory.tar("job-000002").write_bytes(bytes(10240))  # an empty tar
    (there / "quarantine.jsonl").write_text("of before\n", encoding="utf-8")
    (there / "shards/.job-000001.tar.0123.part").write_text("of a process that was killed", encoding="utf-8")
    sender, seen = Push(directory, Remote(there.as_uri())), []
    put = sender.remote.put
    sender.remote.put = lambda path, name: (
        seen.append((name, (there / "shards/job-000002.json").exists())),
        put(path, name),
    )
    sender.shard("job-000002")
    assert seen == [("shards/job-000002.tar", False), ("shards/job-000002.json", False)]
    assert push(directory, there.as_uri()).complete
    assert files(DatasetDir(there)) == files(directory)


def test_target_of_another_dataset_is_refused(make, tmp_path):
    url = (tmp_path / "there").as_uri()
    push(make(), url)
    with pytest.raises(UserError, match="holds another dataset"):
        push(make(folder="other", name="other"), url)
    (tmp_path / "there/dataset.json").unlink()
    (tmp_path / "there/shards/job-000008.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"job-000008.tar, which is not of this dataset"):
        push(make(folder="out"), url)


def test_upload_failure_is_a_one_line_error(s3, make, madgen_here, impatient):
    make()
    result = madgen_here("push", "out", "s3://no-such-bucket/x")
    assert (result.code, len(result.err.splitlines())) == (3, 1)
    assert "the upload is not complete" in result.err
    assert "bucket does not exist" in result.err
    result = madgen_here("push", "out", "s4://bucket/x")
    assert (result.code, result.err) == (
        2,
        "madgen: URL=s4://bucket/x: fsspec knows no s4://; s3, gs, hf, az, file are some that it knows\n",
    )
    result = madgen_here("push", "out", "oss://bucket/x")
    assert (result.code, "needs the package ossfs: pip install ossfs" in result.err) == (2, True)


def test_a_dataset_is_not_pushed_into_itself(make, refused, tmp_path):
    make()
    for url in ((tmp_path / "out").as_uri(), (tmp_path / "out/copy").as_uri(), "file://out/copy"):
        error = f"madgen: URL={url} is inside the dataset out itself; choose another target\n"
        assert refused("push", "out", url) == error


def test_store_checksums_equal_those_of_other_programs(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"panorama\n" * 1000)
    blob = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
    md5 = hashlib.md5(path.read_bytes()).digest()
    infos = {  # as gcsfs, adlfs and huggingface_hub give them
        "MD5": [{"md5Hash": base64.b64encode(md5).decode()}, {"content_settings": {"content_md5": bytearray(md5)}}],
        "SHA-256": [{"lfs": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, "blob_id": "of the pointer"}],
        "git's SHA-1": [{"blob_id": blob, "lfs": None}],
    }
    for kind, known in infos.items():
        for info in known:
            ((name, value, of_file),) = upload._checksums(info)
            assert (name, value) == (kind, of_file(path))


def test_errors_contain_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    error = OSError("PUT https://host/x?X-Amz-Credential=AKIA0/eu&X-Amz-Signature=abcdef \n with hf_0123456789")
    said = upload.describe_error(error)
    assert said == "OSError: PUT https://host/x?X-Amz-Credential=***&X-Amz-Signature=*** with ***"
    assert json.dumps(said)
