"""`prompts.source: dataset://...`: regions of madgen's datasets, and WebDatasets of other tools."""

import base64
import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from madgen import Box, UserError, load_job
from madgen.dataset.plan import build_plan
from madgen.images.decoding import read_mask, read_picture
from madgen.types import MaskPicture, Ramp


def picture(seed=0, height=32, width=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, format=form, **({"lossless": True} if form == "WEBP" else {}))
    return stream.getvalue()


def write_tar(path, members, compress=False):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(stream.getvalue()) if compress else stream.getvalue())


def prompts(source, **settings):
    words = [f"prompts.source=dataset://{source}", "sampling.init.strength=0.5"]
    words += [f"{name}={value}" for name, value in settings.items()]
    return list(build_plan(load_job(overrides=words)).prompts)


def pixels(prompt, column="image"):
    return np.asarray(read_picture(prompt.pictures[column]))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def web(tmp_path):
    return tmp_path / "web"


@pytest.mark.parametrize("name", ["000.tar", "000.tar.gz", "sub/000.tgz"])
def test_formats_of_pictures_and_texts(web, name):
    members = {
        "1.jpg": encoded(picture(), "JPEG"), "1.txt": b"dunes\n", "1.json": b'{"width": 999}',
        "a/2.WEBP": encoded(picture(1), "WEBP"), "a/2.json": b'{"prompt": "sea", "seed": 3}',
        "3.png": encoded(picture(2)), "3.txt": b"\xef\xbb\xbffog", "3.cls": b"7",
    }  # fmt: skip
    write_tar(web / name, members, compress=name != "000.tar")
    first, second, third = prompts(web)
    assert [(p.id, p.text, p.seed) for p in (first, second, third)] == [
        ("1", "dunes", None), ("a_2", "sea", 3), ("3", "fog", None),
    ]  # fmt: skip
    assert np.array_equal(pixels(first), np.asarray(Image.open(io.BytesIO(members["1.jpg"]))))
    assert np.array_equal(pixels(second), np.asarray(picture(1)))
    assert np.array_equal(pixels(third), np.asarray(picture(2)))


def test_braces_and_patterns_name_shards(web):
    for shard in range(3):
        write_tar(web / f"train-{shard:03d}.tar", {f"{shard}.png": encoded(picture(shard)), f"{shard}.txt": b"dunes"})
    assert [p.id for p in prompts(web / "train-{000..002}.tar")] == ["0", "1", "2"]
    assert [p.id for p in prompts(web / "train-{000,002}.tar")] == ["0", "2"]
    assert [p.id for p in prompts(web / "*-00[12].tar")] == ["1", "2"]
    for source, message in (
        (web / "train-{000..003}.tar", r"the tar file .*train-003\.tar does not exist"),
        (web / "train-{000..003.tar", "unbalanced braces"),
        (web / "test-*.tar", r"the tar file .*test-\*\.tar does not exist"),
        ("s3://bucket/shards", "WebDatasets are read from folders; copy this one to this machine"),
        ("pipe:cat a.tar", "WebDatasets are read from folders"),
        (web.parent / "nowhere", "the folder .*nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            prompts(source)


def test_keys_end_at_the_first_dot_as_in_webdataset(web):
    write_tar(web / "0.tar", {"img.v1.png": encoded(picture()), "img.v1.txt": b"dunes"})
    (prompt,) = prompts(web)
    assert (prompt.id, prompt.text) == ("img", "dunes")
    members = {f"img.{side}.png": encoded(picture(n)) for n, side in enumerate(("left", "right"))}
    write_tar(web / "0.tar", {**members, "img.txt": b"dunes"})
    with pytest.raises(
        UserError, match=r":1: sample img in .* has left\.png, right\.png, .*prompts\.columns\.image=left\.png"
    ):
        prompts(web)
    (prompt,) = prompts(web, **{"prompts.columns": "{prompt: txt, image: right.png}"})
    assert np.array_equal(pixels(prompt), np.asarray(picture(1)))


def test_members_of_a_sample_are_its_mask_and_control_picture(web, tmp_path):
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    members = {"1.png": encoded(picture()), "1.mask.png": encoded(mask), "1.control.jpg": encoded(picture(2), "JPEG")}
    write_tar(web / "0.tar", {**members, "1.txt": b"dunes"})
    (prompt,) = prompts(web)
    assert np.array_equal(np.asarray(read_mask(prompt.pictures["mask"])), np.asarray(mask))
    assert np.array_equal(pixels(prompt), np.asarray(picture()))
    (controlled,) = prompts(
        web, **{"sampling.init.strength": "null", "backbone.controlnet.weights": tmp_path / "control"}
    )
    assert list(controlled.pictures) == ["control"]


def test_duplicate_members_and_damaged_shards_are_refused(web):
    write_tar(web / "0.tar", {"1.png": encoded(picture()), "1.PNG": encoded(picture(1)), "1.txt": b"dunes"})
    with pytest.raises(UserError, match=r"sample 1 has two members 'png'"):
        prompts(web)
    write_tar(web / "0.tar", {"1.png": encoded(picture()), "1.txt": b"dunes"})
    whole = (web / "0.tar").read_bytes()
    (web / "0.tar").write_bytes(whole[:-9000])
    with pytest.raises(UserError, match=r"cannot read .*0\.tar"):
        prompts(web)
    (web / "0.tar").unlink()
    (web / "0.tar.gz").write_bytes(gzip.compress(whole)[:-200])
    with pytest.raises(UserError, match=r"cannot read .*0\.tar\.gz"):
        prompts(web)
    write_tar(web / "0.tar.gz", {"1.png": encoded(picture())[:300], "1.txt": b"dunes"}, compress=True)
    with pytest.raises(UserError, match=r":1: cannot read the image in its row"):
        prompts(web)


REGIONS = [
    {"mask": [0, 0, 32, 32], "prompt": "a lake", "negative_prompt": "fog"},
    {"mask": {"png": base64.b64encode(encoded(Image.new("L", (64, 32), 255))).decode()}, "prompt": "a hill",
     "negative_prompt": ""},
]  # fmt: skip
ACROSS = [{"mask": {"ramp": [1, 2]}, "prompt": "night", "negative_prompt": ""}]


def recorded(web, regions, **changes):
    """Write a tar of one sample of 32x64 px in the form of madgen's."""
    record = {"prompt_id": "p", "sample_index": 0, "prompt": "hills", "seed": 1, "height": 32, "width": 64}
    content = json.dumps({**record, "regions": regions, **changes}).encode()
    write_tar(web / "0.tar", {"p-0000.png": encoded(picture()), "p-0000.json": content})


def test_regions_are_carried_over_at_the_size_of_the_panorama(web):
    recorded(web, REGIONS)
    (prompt,) = prompts(web, **{"sampling.init.scale": 2})
    assert [(region.text, region.negative) for region in prompt.regions] == [("a lake", "fog"), ("a hill", "")]
    assert prompt.regions[0].mask == Box(0, 0, 64, 64)
    assert isinstance(prompt.regions[1].mask, MaskPicture)
    recorded(web, ACROSS)
    assert prompts(web)[0].regions[0].mask == Ramp(1, 2)
    (prompt,) = prompts(web, **{"prompts.columns": "{prompt: prompt, seed: seed}"})
    assert prompt.regions == ()
    recorded(web, [])
    job_regions = '[{mask: [0, 0, 16, 16], prompt: "snow"}]'
    assert [region.text for region in prompts(web, **{"prompts.regions": job_regions})[0].regions] == ["snow"]


@pytest.mark.parametrize(
    ("regions", "settings", "message"),
    [
        (REGIONS, {"sampling.init.place": "[0,0]", "sampling.height": 32, "sampling.width": 128}, "carried over to"),
        (REGIONS, {"sampling.init.strength": "null"}, "those of 32x64 px, .* of 512x3072"),
        ([{"mask": {"path": "/etc/hostname"}, "prompt": "x", "negative_prompt": ""}], {}, "regions in its JSON are d"),
        ([{"mask": [0, 0, "x", 1], "prompt": "x", "negative_prompt": ""}], {}, "regions in its JSON are damaged"),
        ([{"mask": [0, 0, 8, 8], "prompt": "", "negative_prompt": ""}], {}, "regions in its JSON are damaged"),
        ([{"prompt": "x"}], {}, "regions in its JSON are damaged"),
        ("x", {}, "regions in its JSON are damaged"),
    ],
)  # fmt: skip
def test_regions_that_do_not_apply_are_refused_with_their_sample(web, regions, settings, message):
    recorded(web, regions)
    with pytest.raises(UserError, match=message) as error:
        prompts(web, **settings)
    assert ":1" in str(error.value)


def test_datasets_with_regions_are_enlarged_with_them(madgen_here, job_file, tmp_path):
    regions = "prompts.regions=[{mask: [0, 0, 32, 32], prompt: the sea}]"
    first = madgen_here("generate", job_file, regions, "output.dir=first", "prompts.limit=1")
    assert first.code == 0, first.err
    job = [job_file, "prompts.source=dataset://first", "prompts.samples_per_prompt=1"]
    made = madgen_here("generate", *job, "sampling.init={scale: 2, strength: 0.5}")
    assert made.code == 0, made.err
    with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
        record = json.load(tar.extractfile(next(name for name in tar.getnames() if name.endswith(".json"))))
    assert record["regions"] == [{"mask": [0, 0, 64, 64], "prompt": "the sea", "negative_prompt": ""}]
    again = madgen_here("regenerate", "out", record["key"], "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
