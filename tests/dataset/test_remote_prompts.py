"""Prompt files on remote file systems: S3 (a local server), HTTP, memory and file URLs."""

import gzip
import http.server
import io
import json
import threading

import fsspec
import pytest
from PIL import Image
from s3_server import client, s3_server

from madgen import load_job
from madgen.dataset.plan import build_plan
from madgen.prompts.cache import plan_key
from madgen.types import Box, MaskPicture
from madgen.utils.errors import UserError

CSV = b"id,prompt\n001,hills\n002,sea\n"


def plan_of(source, *overrides):
    return build_plan(
        load_job([], [f"prompts.source={source}", "sampling.height=64", "sampling.width=128", *overrides])
    )


def ids(plan):
    return [prompt.id for prompt in plan.prompts]


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def bucket(monkeypatch):
    with s3_server(monkeypatch):
        yield client()


@pytest.fixture
def web(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "web"))

        def log_message(self, *_):
            pass

    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def mask(value=255):
    stream = io.BytesIO()
    Image.new("L", (128, 64), value).save(stream, "PNG")
    return stream.getvalue()


def test_s3(bucket, tmp_path):
    (tmp_path / "p.csv").write_bytes(CSV)
    local = plan_of(tmp_path / "p.csv")
    bucket.put_object(Bucket="bucket", Key="lists/a.csv", Body=CSV)
    plan = plan_of("s3://bucket/lists/a.csv")
    assert list(plan.prompts) == list(local.prompts)
    assert (plan.prompts_digest, plan.keys_digest) == (local.prompts_digest, local.keys_digest)
    assert plan.prompts.location(1) == "s3://bucket/lists/a.csv:3"
    bucket.put_object(Bucket="bucket", Key="lists/b.csv.gz", Body=gzip.compress(b"id,prompt\n003,fog\n"))
    assert ids(plan_of("s3://bucket/lists/*.csv*")) == ["001", "002", "003"]
    bucket.put_object(Bucket="bucket", Key="lists/a.csv", Body=CSV.replace(b"001", b"009"))
    again = plan_of("s3://bucket/lists/a.csv")
    assert ids(again) == ["009", "002"]
    assert again.key != plan.key
    for source, message in (
        ("s3://bucket/no.txt", r"prompts\.source=s3://bucket/no\.txt does not exist$"),
        ("s3://bucket/no*.txt", r"matches no file"),
        ("s3://nobucket/no.txt", r"prompts\.source=s3://nobucket/no\.txt (does not exist|cannot be read)"),
        ("s3://bucket/lists", r"must end in \.csv"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            plan_of(source)
        assert "\n" not in str(refused.value)


def test_http(web):
    folder, url = web
    (folder / "p.jsonl").write_text(
        '{"id": "a", "prompt": "hills"}\n{"id": "b", "prompt": "sea\u200b"}', encoding="utf-8"
    )
    with pytest.raises(UserError, match=rf"{url}/p\.jsonl:2: the prompt contains U\+200B"):
        plan_of(f"{url}/p.jsonl")
    (folder / "p.jsonl").write_text('{"id": "a", "prompt": "hills"}\n', encoding="utf-8")
    plan = plan_of(f"{url}/p.jsonl")
    assert ids(plan) == ["a"]
    assert plan_key(load_job([], [f"prompts.source={url}/p.jsonl"])) != plan.key  # of another size
    with pytest.raises(UserError, match=rf"prompts\.source={url}/q\.jsonl does not exist"):
        plan_of(f"{url}/q.jsonl")


def test_file_urls_are_local_files(tmp_path):
    (tmp_path / "p.csv").write_bytes(CSV)
    assert ids(plan_of(f"file://{tmp_path}/p.csv")) == ["001", "002"]
    assert ids(plan_of(f"file://{tmp_path}/*.csv")) == ["001", "002"]


def test_cached_plans_follow_the_content(memory, tmp_path):
    memory.pipe("/lists/p.csv", CSV)
    plan = plan_of("memory://lists/p.csv")
    plan.save(tmp_path / "cache")
    job = load_job([], ["prompts.source=memory://lists/p.csv", "sampling.height=64", "sampling.width=128"])
    assert build_plan(job, tmp_path / "cache").key == plan.key
    memory.pipe("/lists/p.csv", CSV)  # the same content again
    assert plan_key(job) == plan.key
    memory.pipe("/lists/p.csv", CSV.replace(b"hills", b"peaks"))
    assert [prompt.text for prompt in build_plan(job, tmp_path / "cache").prompts] == ["peaks", "sea"]


def test_masks_beside_a_remote_file(memory, tmp_path):
    regions = [{"mask": "masks/lake.png", "prompt": "a lake"}, {"mask": [0, 0, 8, 8], "prompt": "a hut"}]
    memory.pipe("/lists/p.jsonl", json.dumps({"prompt": "hills", "regions": regions}).encode())
    with pytest.raises(UserError, match=r"p\.jsonl:1: mask memory://lists/masks/lake\.png does not exist"):
        plan_of("memory://lists/p.jsonl")
    memory.pipe("/lists/masks/lake.png", mask())
    plan = plan_of("memory://lists/p.jsonl")
    picture, box = plan.prompts[0].regions
    assert isinstance(picture.mask, MaskPicture)  # other processes need no file
    assert box.mask == Box(0, 0, 8, 8)
    plan.save(tmp_path / "cache")
    job = load_job([], ["prompts.source=memory://lists/p.jsonl", "sampling.height=64", "sampling.width=128"])
    assert build_plan(job, tmp_path / "cache").prompts[0] == plan.prompts[0]
    memory.pipe("/other/p.jsonl", memory.cat("/lists/p.jsonl"))
    memory.pipe("/other/masks/lake.png", mask(128))
    assert plan_of("memory://other/p.jsonl").prompts_digest != plan.prompts_digest


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "~/x.png", "a/../../x.png", "s3://bucket/x.png"])
def test_masks_of_remote_files_are_beside_them(memory, name):
    memory.pipe("/lists/p.jsonl", json.dumps({"prompt": "a", "regions": [{"mask": name, "prompt": "b"}]}).encode())
    with pytest.raises(UserError, match=r"p\.jsonl:1: mask .* must be a path relative to memory://lists"):
        plan_of("memory://lists/p.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3:/bucket/p.txt", r"prompts\.source=s3:/bucket/p\.txt does not exist; a URL starts with s3://"),
        ("https:/host/p.txt", r"does not exist; a URL starts with https://"),
        ("nosuch://host/p.txt", r"fsspec knows no nosuch://"),
        ("gs://bucket/p.txt", r"gs:// needs the package gcsfs: pip install 'madgen\[gcs\]'"),
        ("https://user:secret@host/p.txt", r"must not contain a password|contains a password"),
        ("memory://lists/p.doc", r"must end in \.csv"),
        ("memory://lists/no.txt", r"prompts\.source=memory://lists/no\.txt does not exist"),
    ],
)
def test_invalid_urls_are_refused_in_one_line(memory, source, message):
    with pytest.raises(UserError, match=message) as refused:
        plan_of(source)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
