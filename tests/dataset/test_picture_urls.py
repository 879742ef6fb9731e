"""Pictures at URLs and in cells of tables: read if the job allows it, cached, and identified by their content."""

import hashlib
import http.server
import io
import json
import shutil
import threading

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import client, s3_server

from madgen import UserError, load_job
from madgen.dataset.plan import build_plan
from madgen.images import decoding, picture_cache
from madgen.images.decoding import read_picture
from madgen.prompts import picture_files
from madgen.prompts.readers import PromptFile, ReadOptions, parquet


def png(seed=0, height=32, width=64):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache, in this process and on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache/madgen/pictures"


def forget():
    for function in (picture_files._of_url, picture_files._examined, decoding.read_picture):
        function.cache_clear()


class Web:
    """A server of `files` by path, with ETags unless `tags` is false; `requests` has the methods and paths."""

    def __init__(self):
        self.files, self.requests, self.tags, self.endless = {}, [], True, False
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                web.requests.append(f"{self.command} {self.path}")
                content = web.files.get(self.path)
                self.send_response(404 if content is None else 200)
                if content is not None and web.tags:
                    self.send_header("ETag", hashlib.sha256(content).hexdigest())
                if content is not None and not web.endless:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()

            def do_GET(self):
                self.do_HEAD()
                content = web.files.get(self.path, b"")
                try:
                    self.wfile.write(content)
                    while web.endless:
                        self.wfile.write(bytes(1 << 16))
                except OSError:
                    pass  # the client has seen enough

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web():
    server = Web()
    yield server
    server.server.shutdown()
    server.server.server_close()


def plan(tmp_path, *images, allow=(), **settings):
    source = tmp_path / "prompts.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"hills {n}", "image": i}) + "\n" for n, i in enumerate(images)), encoding="utf-8"
    )
    return planned(source, allow, **settings)


def planned(source, allow=(), **settings):
    words = [f"prompts.source={source}", "sampling.init.strength=0.5"]
    words += [f"prompts.allow_picture_urls={json.dumps(list(allow))}"] if allow else []
    return build_plan(load_job(overrides=[*words, *(f"{name}={value}" for name, value in settings.items())]))


def test_picture_at_an_allowed_url_is_downloaded_once_and_cached(tmp_path, web, cache):
    web.files["/p/a.png"] = png()
    url = f"{web.url}/p/a.png"
    (prompt,) = plan(tmp_path, url, allow=[f"{web.url}/p"]).prompts
    picture = prompt.pictures["image"]
    assert (picture.path, picture.sha256) == (url, hashlib.sha256(png()).hexdigest())
    assert (picture.height, picture.width) == (32, 64)
    forget()
    digest = plan(tmp_path, url, allow=[f"{web.url}/p"]).prompts_digest
    assert [request for request in web.requests if request.startswith("GET")] == ["GET /p/a.png"]
    (tmp_path / "a.png").write_bytes(png())
    assert plan(tmp_path, "a.png").prompts_digest == digest  # identified by its content
    web.server.shutdown()
    web.server.server_close()
    forget()
    assert plan(tmp_path, url, allow=[f"{web.url}/p"]).prompts_digest == digest  # on a node without a network
    assert np.array_equal(np.asarray(read_picture(picture)), decoded(png()))


def test_changed_picture_is_another_job_and_is_not_read_as_the_old_one(tmp_path, web, cache):
    web.files["/a.png"] = png()
    first = plan(tmp_path, f"{web.url}/a.png", allow=[web.url])
    web.files["/a.png"] = png(1)
    forget()
    assert plan(tmp_path, f"{web.url}/a.png", allow=[web.url]).prompts_digest != first.prompts_digest
    shutil.rmtree(cache)
    with pytest.raises(UserError, match=r"a\.png has changed since the job was planned"):
        read_picture(first.prompts[0].pictures["image"])
    web.files["/a.png"] = png()
    assert np.array_equal(np.asarray(read_picture(first.prompts[0].pictures["image"])), decoded(png()))


def test_removed_picture_is_missing_though_it_is_cached(tmp_path, web):
    web.files["/a.png"] = png()
    plan(tmp_path, f"{web.url}/a.png", allow=[web.url])
    del web.files["/a.png"]
    forget()
    with pytest.raises(UserError, match=r":1: .*a\.png does not exist"):
        plan(tmp_path, f"{web.url}/a.png", allow=[web.url])


def test_servers_without_versions_are_asked_again(tmp_path, web):
    web.tags = False
    for seed in (0, 1):
        web.files["/a.png"] = png(seed)
        forget()
        (prompt,) = plan(tmp_path, f"{web.url}/a.png", allow=[web.url]).prompts
        assert prompt.pictures["image"].sha256 == hashlib.sha256(png(seed)).hexdigest()


def test_nothing_is_read_unless_it_is_allowed(tmp_path, web):
    web.files["/p/a.png"] = web.files["/private.png"] = png()
    host = web.url.removeprefix("http://")
    allow = [f"{web.url}/p/"]
    with pytest.raises(UserError, match=r":1: image .*a\.png is a URL, .*set prompts\.allow_picture_urls=\[http://127"):
        plan(tmp_path, f"{web.url}/p/a.png")
    for url, message in (
        (f"{web.url}/private.png", "unless the job allows it"),
        (f"{web.url}/private/../p/../private.png", "is not a plain URL"),
        (f"{web.url}/p/%2e%2e/private.png", "is not a plain URL"),
        (f"{web.url}/p/%252e%252e/private.png", "is not a plain URL"),
        (f"{web.url}/p\\a.png", "is not a plain URL"),
        (f"http://user@{host}/p/a.png", "unless the job allows it"),
        (f"{web.url}.example.org/p/a.png", "unless the job allows it"),
        (f"simplecache::{web.url}/p/a.png", "is not a plain URL"),
        (f"file://{tmp_path}/prompts.jsonl", "is not a plain URL"),
        ("s3://bucket/a.png", "unless the job allows it"),
        (f"{web.url}/p/a\n.png", "is not a plain URL"),
        ("http://[bad/a.png", "is not a plain URL"),
    ):
        with pytest.raises(UserError, match=message) as error:
            plan(tmp_path, url, allow=allow)
        assert str(error.value).startswith(f"{tmp_path}/prompts.jsonl:1: ")
    assert web.requests == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"missing\.png does not exist"),
        (b"<html>no picture</html>", "it is not a picture"),
        (png()[:-100], "cannot read the image"),
        (b"", "it is not a picture"),
        (png(height=300, width=400), "has more than 100000 px"),
    ],
)
def test_wrong_pictures_at_urls_are_refused_with_their_line(tmp_path, web, cache, monkeypatch, content, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    web.files = {"/a.png": png()} | ({} if content is None else {"/missing.png": content})
    with pytest.raises(UserError, match=message) as error:
        plan(tmp_path, f"{web.url}/a.png", f"{web.url}/missing.png", allow=[web.url])
    assert str(error.value).startswith(f"{tmp_path}/prompts.jsonl:2: ")
    assert "\n" not in str(error.value)


def test_endless_answers_are_cut_off(tmp_path, web, monkeypatch):
    monkeypatch.setattr(picture_cache, "MAX_BYTES", 3 << 20)
    web.files["/a.png"], web.endless = png(), True
    with pytest.raises(UserError, match=r":1: .*a\.png has more than 3 MiB"):
        plan(tmp_path, f"{web.url}/a.png", allow=[web.url])


def test_signatures_in_urls_are_not_printed(tmp_path, web):
    with pytest.raises(UserError) as error:
        plan(tmp_path, f"{web.url}/a.png?X-Amz-Signature=0123456789abcdef", allow=[web.url])
    assert "0123456789abcdef" not in str(error.value)


def test_pictures_in_buckets_and_beside_a_prompt_file_there(tmp_path, monkeypatch):
    with s3_server(monkeypatch):
        bucket = client()
        bucket.create_bucket(Bucket="pictures")
        bucket.put_object(Bucket="pictures", Key="sub/a.png", Body=png())
        bucket.put_object(Bucket="pictures", Key="p.jsonl", Body=b'{"prompt": "hills", "image": "sub/a.png"}\n')
        (prompt,) = plan(tmp_path, "s3://pictures/sub/a.png", allow=["s3://pictures/"]).prompts
        (beside,) = planned("s3://pictures/p.jsonl").prompts
        assert prompt.pictures == beside.pictures
        assert np.array_equal(np.asarray(read_picture(beside.pictures["image"])), decoded(png()))
        bucket.put_object(Bucket="pictures", Key="p.jsonl", Body=b'{"prompt": "hills", "image": "../a.png"}\n')
        with pytest.raises(
            UserError, match=r"p\.jsonl:1: image '\.\./a\.png' must be a path relative to s3://pictures"
        ):
            planned("s3://pictures/p.jsonl")


def test_cells_of_image_columns_are_pictures(tmp_path):
    """Of Parquet files, and of datasets with an Image feature, as `datasets` writes them."""
    table = pa.table({"prompt": ["hills", "sea"], "image": [{"bytes": png(n), "path": f"{n}.png"} for n in (0, 1)]})
    pq.write_table(table, tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["hills", "sea"], "image": [png(0), png(1)]}), tmp_path / "raw.parquet")
    rows = {"prompt": ["hills", "sea"], "image": [Image.open(io.BytesIO(png(n))) for n in (0, 1)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "hub/0.parquet")
    for source in ("p.parquet", "raw.parquet", "hf://SAVED", "hf://HUB"):
        name = source.replace("SAVED", f"{tmp_path}/saved").replace("HUB", f"{tmp_path}/hub")
        prompts = planned(name if "://" in source else tmp_path / source).prompts
        assert [prompt.text for prompt in prompts] == ["hills", "sea"]
        for number, prompt in enumerate(prompts):
            assert np.array_equal(np.asarray(read_picture(prompt.pictures["image"])), decoded(png(number))), source


def test_tables_of_pictures_are_read_in_small_parts(tmp_path):
    table = pa.table({"prompt": ["hills"] * 200, "image": [png()] * 200})
    pq.write_table(table, tmp_path / "p.parquet")
    pictures_too = ReadOptions(fields=("prompt", "image"))
    for options, most in ((pictures_too, 64), (ReadOptions(columns={"prompt": "prompt"}), 200)):
        chunks = list(parquet.read(PromptFile(tmp_path / "p.parquet", "p.parquet"), options))
        assert [max(len(chunk.rows) for chunk in chunks), sum(len(chunk.rows) for chunk in chunks)] == [most, 200]


def test_paths_in_cells_follow_the_rules_of_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t").mkdir()
    (tmp_path / "t/b.png").write_bytes(png(1))
    cells = [{"bytes": None, "path": "b.png"}]
    pq.write_table(pa.table({"prompt": ["hills"], "image": cells}), tmp_path / "t/p.parquet")
    (prompt,) = planned(tmp_path / "t/p.parquet").prompts
    assert prompt.pictures["image"].path == str(tmp_path / "t/b.png")
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}]
    pq.write_table(pa.table({"prompt": ["hills"], "image": cells}), tmp_path / "t/p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet:1: image file .*a\.png is outside the folder of the prompt file"):
        planned(tmp_path / "t/p.parquet")


def test_damaged_cells_are_refused_with_their_row(tmp_path):
    pq.write_table(pa.table({"prompt": ["hills", "sea"], "image": [png(), png()[:200]]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet:2: cannot read the image in its row"):
        planned(tmp_path / "p.parquet")


def test_missing_cache_of_cells_is_named_with_the_command_that_fills_it(tmp_path, cache):
    pq.write_table(pa.table({"prompt": ["hills"], "image": [png()]}), tmp_path / "p.parquet")
    (prompt,) = planned(tmp_path / "p.parquet").prompts
    shutil.rmtree(cache)
    with pytest.raises(UserError, match="run `madgen plan` on this machine to cache it"):
        read_picture(prompt.pictures["image"])


def test_urls_need_a_job_that_reads_pictures(tmp_path):
    with pytest.raises(UserError, match=r"allow_picture_urls=.* has no effect: the job reads no pictures"):
        load_job(overrides=['prompts.allow_picture_urls=["https://example.com/"]'])
    with pytest.raises(UserError, match=r"must be beginnings of URLs, such as .*, got 'example.com'"):
        load_job(overrides=["prompts.allow_picture_urls=[example.com]", "sampling.init.strength=0.5"])


def test_dataset_from_urls_is_verified_and_regenerated(madgen_here, job_file, tmp_path, web):
    web.files["/a.png"] = png()
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"id": "a", "prompt": "hills", "image": f"{web.url}/a.png"}) + "\n", encoding="utf-8"
    )
    job = [job_file, "prompts.source=p.jsonl", "prompts.samples_per_prompt=1", "sampling.init.strength=0.5"]
    refused = madgen_here("generate", *job)
    assert (refused.code, refused.err.count("\n"), (tmp_path / "out").exists()) == (2, 1, False), refused.err
    made = madgen_here("generate", *job, f"prompts.allow_picture_urls=[{web.url}/]")
    assert made.code == 0, made.err
    assert madgen_here("verify", "out").code == 0
    for arguments in ([], ["--image", f"{web.url}/a.png"]):
        again = madgen_here("regenerate", "out", "a-0000", "-o", "again.png", *arguments)
        assert (again.code, "the same pixels" in again.out) == (0, True), again.err
