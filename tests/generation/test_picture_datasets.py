"""Datasets that start from pictures, on the command line: from prompt lines, and from another dataset."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image


def picture(height=32, width=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def job(job_file, tmp_path):
    """Return arguments of a job of four pictures, of which the first half is kept in two."""
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    lines = []
    for number in range(4):
        picture(seed=number).save(tmp_path / f"{number}.png")
        lines.append({"id": f"p{number}", "prompt": "hills", "image": f"{number}.png"})
        lines[-1] |= {"mask": "mask.png"} if number > 1 else {}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = ["prompts.source=p.jsonl", "prompts.samples_per_prompt=1", "sampling.num_inference_steps=4"]
    return [job_file, *settings, "sampling.init={strength: 0.5, feather: 4}", "backbone.dtype=float32"]


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def shards(folder):
    return [path.read_bytes() for path in sorted((folder / "shards").glob("*.tar"))]


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_dataset_from_pictures(madgen_here, job, tmp_path):
    made = madgen_here("generate", *job)
    assert made.code == 0, made.err
    samples = members(tmp_path / "out/shards/job-000000.tar")
    recorded = [json.loads(samples[f"p{number}-0000.json"]) for number in range(3)]
    assert [list(one["pictures"]) for one in recorded] == [["image"], ["image"], ["image", "mask"]]
    assert recorded[0]["sampling"]["init"] == {"strength": 0.5, "scale": 1.0, "resample": "lanczos", "feather": 4}
    assert str(tmp_path) not in json.dumps(recorded)
    assert np.array_equal(pixels(samples["p2-0000.png"])[:, :28], np.asarray(picture(seed=2))[:, :28])
    assert not np.array_equal(pixels(samples["p1-0000.png"])[:, :28], np.asarray(picture(seed=1))[:, :28])
    assert madgen_here("verify", "out").code == 0
    assert madgen_here("preview", "out").code == 0
    page = (tmp_path / "out/preview.html").read_text(encoding="utf-8")
    assert len(re.findall(r'"caption": ?"Started from", ?"picture": ?"data:image/webp;base64,', page)) == 4
    assert len(re.findall(r'"caption": ?"Kept \(white\)"', page)) == 2
    assert "complete" in madgen_here("generate", *job).err + madgen_here("status", "out").out
    for key in ("p1-0000", "p2-0000"):
        again = madgen_here("regenerate", "out", key, "-o", "again.png")
        assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    (tmp_path / "2.png").rename(tmp_path / "moved.png")
    missing = madgen_here("regenerate", "out", "p2-0000", "-o", "again.png")
    assert (missing.code, "pass --image FILE" in missing.err) == (2, True)
    assert madgen_here("regenerate", "out", "p2-0000", "-o", "again.png", "--image", "moved.png").code == 0
    other = madgen_here("regenerate", "out", "p2-0000", "-o", "again.png", "--image", "1.png")
    assert (other.code, "has other content" in other.err) == (2, True)
    unused = madgen_here("regenerate", "out", "p1-0000", "-o", "again.png", "--mask", "mask.png")
    assert (unused.code, "--mask=mask.png has no effect" in unused.err) == (2, True)


@pytest.mark.slow
def test_bytes_depend_on_the_job_alone(madgen, job, tmp_path):
    """Not on workers, an interruption, or where the pictures are."""
    assert madgen("generate", *job, "output.samples_per_shard=1").code == 0
    first = shards(tmp_path / "out")
    assert len(first) == 4
    two = madgen("generate", *job, "output.samples_per_shard=1", "output.dir=two", "trainer.devices=2")
    assert two.code == 0, two.err
    assert shards(tmp_path / "two") == first
    for path in (tmp_path / "two/shards").glob("*-00000[13].*"):
        path.unlink()
    (tmp_path / "sub").mkdir()
    for path in (*tmp_path.glob("*.png"), tmp_path / "p.jsonl"):
        path.rename(tmp_path / "sub" / path.name)
    moved = [*job, "prompts.source=sub/p.jsonl"]
    resumed = madgen("generate", *moved, "output.samples_per_shard=1", "output.dir=two")
    assert resumed.code == 0, resumed.err
    assert shards(tmp_path / "two") == first


def test_another_picture_is_another_dataset(madgen_here, job, tmp_path):
    assert madgen_here("generate", *job, "prompts.limit=1").code == 0
    picture(seed=9).save(tmp_path / "0.png")
    refused = madgen_here("generate", *job, "prompts.limit=1")
    assert (refused.code, "holds a dataset of another job" in refused.err) == (2, True)


def test_plan_counts_the_steps_that_run(madgen_here, job, tmp_path):
    plans, job = {}, [*job, "prompts.limit=2"]  # those that keep nothing
    for strength in (1, 0.5, 0):
        planned = madgen_here("plan", *job, f"sampling.init.strength={strength}", "--json")
        assert planned.code == 0, planned.err
        plans[strength] = json.loads(planned.out)
    assert plans[1]["view_evaluations"] == 2 * plans[0.5]["view_evaluations"] > 0
    assert plans[0]["view_evaluations"] == 0
    assert [plan["pictures"] for plan in plans.values()] == [0, 2, 2]
    assert "2 pictures encoded; 2 of 4 steps at strength=0.5" in madgen_here("plan", *job).out
    heun = json.loads(madgen_here("plan", *job, "sampling.scheduler=HeunDiscreteScheduler", "--json").out)
    assert heun["view_evaluations"] == 1.5 * plans[0.5]["view_evaluations"]  # 2 + 1 of 7 evaluations


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ({"image": "x.png"}, [], "p.jsonl:5: image file x.png does not exist"),
        ({"image": "odd.png"}, [], "p.jsonl:5: width=70 px cannot be covered by views"),
        ({"image": "odd.png"}, ["sampling.init.scale=2"], "p.jsonl:5: width=140 px cannot be covered by views"),
        ({"image": "0.png"}, ["sampling.scheduler=LMSDiscreteScheduler"], "scheduler=LMSDiscreteScheduler needs the"),
        ({"image": "0.png"}, ["sampling.init.strength=0.1"], "less than one step; raise it to 0.25"),
        ({"image": "0.png"}, ["sampling.init.strength=2"], "sampling.init.strength must be in 0..1 or null, got 2"),
        ({"image": "0.png"}, ["sampling.guidance_steps=[0,3]"], "must end within the 2 steps that run"),
        ({"image": "0.png"}, ["sampling.init.strength=null"], "sampling.init.feather has no effect"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(madgen_here, job, tmp_path, line, settings, message):
    picture(32, 70).save(tmp_path / "odd.png")
    with open(tmp_path / "p.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "sea", **line}) + "\n")
    for command in ("plan", "generate"):
        refused = madgen_here(command, *job, *settings)
        assert (refused.code, message in refused.err) == (2, True), refused.err
        assert refused.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dataset_starts_from_a_dataset(madgen_here, job_file, tmp_path):
    assert madgen_here("generate", job_file, "output.dir=first", "prompts.negative_prompt=fog").code == 0
    job = [job_file, "prompts.source=dataset://first", "prompts.samples_per_prompt=1", "name=large"]
    job += ["sampling.init={scale: 2, strength: 0.5}"]
    made = madgen_here("generate", *job)
    assert made.code == 0, made.err
    first, large = (
        {
            name: content
            for path in sorted((tmp_path / folder / "shards").glob("*.tar"))
            for name, content in members(path).items()
        }
        for folder in ("first", "out")
    )
    keys = sorted(name.removesuffix(".json") for name in first if name.endswith(".json"))
    assert len(keys) == 10
    for key in keys:
        new = key if key.endswith("-0000") else f"{key}-0000"
        before, after = json.loads(first[f"{key}.json"]), json.loads(large[f"{new}.json"])
        assert [before[name] for name in ("prompt", "negative_prompt", "seed")] == [
            after[name] for name in ("prompt", "negative_prompt", "seed")
        ]
        assert (after["height"], after["width"]) == (64, 128)
    again = madgen_here("regenerate", "out", f"{keys[1]}-0000", "-o", "again.png")
    assert (again.code, "the same pixels" in again.out) == (0, True), again.err
    zero = madgen_here("generate", *job, "output.dir=zero", "sampling.init.strength=0")
    assert zero.code == 0, zero.err


def write_tar(path, *samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def encoded(image, form):
    stream = io.BytesIO()
    image.save(stream, format=form)
    return stream.getvalue()


def test_foreign_webdatasets_are_read(madgen_here, job_file, tmp_path):
    (tmp_path / "web").mkdir()
    write_tar(
        tmp_path / "web/000.tar",
        ("a/x.1.jpg", b"not a sample of key a/x"), ("000001.jpg", encoded(picture(), "JPEG")),
        ("000001.txt", b" dunes\n"),
        ("000001.json", b'{"width": 640, "caption": "a lake"}'), ("b/2.webp", encoded(picture(seed=1), "WEBP")),
        ("b/2.json", b'{"prompt": "sea", "seed": 3}'),
    )  # fmt: skip
    settings = ["prompts.source=dataset://web", "sampling.init.strength=0.5", "prompts.samples_per_prompt=1"]
    broken = madgen_here("plan", job_file, *settings)
    assert (broken.code, "dataset://web:1: sample a/x in" in broken.err, "has no prompt" in broken.err) == (
        2,
        True,
        True,
    )
    samples = members(tmp_path / "web/000.tar")
    del samples["a/x.1.jpg"]
    write_tar(tmp_path / "web/000.tar", *samples.items())
    made = madgen_here("generate", job_file, *settings)
    assert made.code == 0, made.err
    result = members(tmp_path / "out/shards/job-000000.tar")
    prompts = {name: json.loads(text)["prompt"] for name, text in result.items() if name.endswith(".json")}
    assert prompts == {"000001-0000.json": "dunes", "b_2-0000.json": "sea"}
    (tmp_path / "web/000.tar").write_bytes((tmp_path / "web/000.tar").read_bytes()[:3000])
    damaged = madgen_here("plan", job_file, *settings)
    assert (damaged.code, damaged.err.count("\n")) == (2, 1), damaged.err
    empty = madgen_here("plan", job_file, "prompts.source=dataset://nowhere", "sampling.init.strength=0.5")
    assert (empty.code, "the folder nowhere does not exist" in empty.err) == (2, True)
