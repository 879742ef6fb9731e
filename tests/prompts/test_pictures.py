import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from madgen import UserError, load_job
from madgen.dataset.plan import build_plan
from madgen.images.decoding import read_picture


def noise(height=32, width=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    noise().save(tmp_path / "a.png")
    noise(seed=1).save(tmp_path / "b.png")
    return tmp_path


def plan(folder, *lines, strength=0.5, **settings):
    source = folder / "prompts.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"hills {n}", **line}) + "\n" for n, line in enumerate(lines)), encoding="utf-8"
    )
    words = [f"prompts.source={source}", f"sampling.init.strength={strength}"]
    words += [f"{name}={value}" for name, value in settings.items()]
    return build_plan(load_job(overrides=words))


def digest(folder, *lines, **settings):
    return plan(folder, *lines, **settings).prompts_digest


def test_rows_name_a_picture_in_the_folder_of_their_file(folder):
    (prompt,) = plan(folder, {"image": "a.png"}).prompts
    picture = prompt.pictures["image"]
    assert (picture.path, picture.height, picture.width) == (str(folder / "a.png"), 32, 64)
    assert np.array_equal(np.asarray(read_picture(picture)), np.asarray(noise()))
    assert prompt.place is None


def test_panorama_has_the_size_of_the_enlarged_picture(folder):
    sizes = [(p.height, p.width) for p in plan(folder, {"image": "a.png"}, {"image": "b.png"}).prompts]
    assert sizes == [(32, 64)] * 2
    (enlarged,) = plan(folder, {"image": "a.png"}, **{"sampling.init.scale": 2.5}).prompts
    assert (enlarged.height, enlarged.width) == (80, 160)
    (resized,) = plan(folder, {"image": "a.png", "height": 64, "width": 128}).prompts
    assert (resized.height, resized.width) == (64, 128)


@pytest.mark.parametrize(("place", "left_top"), [([8, 16], (8, 16)), ("center", (32, 16)), ("[8, 16]", (8, 16))])
def test_placed_picture_lies_on_a_panorama_of_the_row_or_the_job(folder, place, left_top):
    row, job = {"image": "a.png", "height": 64, "width": 128}, {"sampling.height": 64, "sampling.width": 128}
    assert [p.place for p in plan(folder, {**row, "place": place}).prompts] == [left_top]
    (prompt,) = plan(folder, {"image": "a.png", "place": place}, **job).prompts
    assert (prompt.place, prompt.height, prompt.width) == (left_top, 64, 128)
    if place == [8, 16]:
        (prompt,) = plan(folder, {"image": "a.png"}, **job, **{"sampling.init.place": "[8,16]"}).prompts
        assert prompt.place == left_top


def test_csv_rows_name_pictures(folder):
    (folder / "p.csv").write_text('prompt,image,place,width\nhills,a.png,,\nsea,a.png,"[4, 0]",96\n', encoding="utf-8")
    words = [f"prompts.source={folder}/p.csv", "sampling.init.strength=1", "sampling.height=32"]
    first, second = build_plan(load_job(overrides=words)).prompts
    assert (first.place, second.place) == (None, (4, 0))


def test_digest_depends_on_content_and_place_not_on_paths(folder):
    one = digest(folder, {"image": "a.png"})
    (folder / "sub").mkdir()
    (folder / "a.png").rename(folder / "sub" / "c.png")
    assert digest(folder, {"image": "sub/c.png"}) == one
    assert digest(folder, {"image": "b.png"}) != one
    Image.new("L", (64, 32)).save(folder / "none.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(folder / "mask.png")
    assert digest(folder, {"image": "sub/c.png", "mask": "mask.png"}) != one
    row = {"image": "sub/c.png", "width": 128, "height": 32}
    places = {digest(folder, {**row, "place": place}) for place in ([0, 0], [8, 0], "center", [32, 0])}
    assert len(places) == 3  # the last two are the same


def test_cached_plan_notices_a_changed_picture(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    first = plan(folder, {"image": "a.png"})
    first.save(cache)
    job = load_job(overrides=[f"prompts.source={folder}/prompts.jsonl", "sampling.init.strength=0.5"])
    assert build_plan(job, cache).prompts_digest == first.prompts_digest
    noise(seed=7).save(folder / "a.png")
    assert build_plan(job, cache).prompts_digest != first.prompts_digest
    with pytest.raises(UserError, match=r"image .*a\.png has changed since the job was planned"):
        read_picture(first.prompts[0].pictures["image"])


def test_photos_are_turned_upright(folder):
    photo, exif = noise(), Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    photo.save(folder / "photo.png", exif=exif)
    (prompt,) = plan(folder, {"image": "photo.png"}).prompts
    assert (prompt.height, prompt.width) == (64, 32)
    assert np.array_equal(np.asarray(read_picture(prompt.pictures["image"])), np.rot90(np.asarray(photo), -1))


def test_columns_with_these_names_are_kept_by_jobs_without_pictures(folder):
    source = folder / "prompts.jsonl"
    source.write_text('{"prompt": "hills", "place": "Rome", "image": "https://example.com/a.png"}\n', encoding="utf-8")
    job = load_job(overrides=[f"prompts.source={source}", "prompts.keep_columns=all"])
    (prompt,) = build_plan(job).prompts
    assert prompt.columns == {"place": "Rome", "image": "https://example.com/a.png"}
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:1: the field 'image' has no effect .*sampling\.init\.strength"
    ):
        build_plan(load_job(overrides=[f"prompts.source={source}"]))
    with pytest.raises(UserError, match=r"prompts\.columns\.image has no effect; set sampling\.init\.strength"):
        load_job(overrides=["prompts.columns={prompt: prompt, image: file}"])


def bomb():
    """Return a PNG of 20000x20000 px in a few bytes, whose data is never reached."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


CONTENT = {
    "text.png": b"no picture",
    "cut.png": encoded(noise(256, 256), format="PNG")[:-2000],
    "cut.jpg": encoded(noise(256, 256), format="JPEG")[:-2000],
    "bomb.png": bomb(),
    "large.png": encoded(Image.new("L", (10_000, 9_000)), format="PNG"),
    "deep.png": encoded(Image.fromarray(np.full((32, 64), 1000, np.uint16)), format="PNG"),
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no image; sampling.init.strength=0.5 starts from a picture of each row"),
        ({"image": ""}, "no image"),
        ({"image": 7}, "image must be the name of a picture file, got 7"),
        ({"image": {"bytes": "x"}}, "image must be the name of a picture file, got"),
        ({"image": "missing.png"}, "image file missing.png exists neither in"),
        ({"image": "/proc/self/status"}, "image file /proc/self/status is empty"),
        ({"image": "../private.png"}, "image file ../private.png is outside the folder of the prompt file"),
        ({"image": "a\0.png"}, "NUL"),
        ({"image": "text.png"}, "cannot read the image .*text.png: it is not a picture"),
        ({"image": "cut.png"}, "cannot read the image .*cut.png"),
        ({"image": "cut.jpg"}, "cannot read the image .*cut.jpg"),
        ({"image": "bomb.png"}, "the image .*bomb.png has more than .* px; shrink it"),
        ({"image": "large.png"}, r"large.png of 9000x10000 px \(height x width\) has more than .* px; shrink it"),
        ({"image": "deep.png"}, "the image .*deep.png has more than 8 bits per channel"),
        ({"image": "a.png", "mask": "small.png"}, "the mask of 16x16 px .* must have the size of its image, 32x64 px"),
        ({"image": "a.png", "mask": "white.png"}, "the mask keeps everything"),
        ({"image": "a.png", "mask": "black.png"}, "the mask keeps nothing"),
        (
            {"image": "a.png", "height": 64, "width": 64},
            "the image of 32x64 px .* another aspect ratio than the panorama",
        ),
        ({"image": "a.png", "height": 64}, "another aspect ratio than the panorama of 64x3072 px"),
        (
            {"image": "a.png", "width": 128, "place": [80, 0]},
            r"at place \[80, 0\] is not inside the panorama of 32x128",
        ),
        ({"image": "a.png", "width": 128, "place": [-8, 0]}, "place must be"),
        ({"image": "a.png", "width": 128, "place": "left"}, "place must be"),
        ({"image": "a.png", "width": 128, "place": [1]}, "place must be"),
        ({"image": "a.png", "width": 64, "place": [0, 0]}, "the image covers the whole panorama"),
    ],
)
def test_bad_pictures_are_refused_with_their_line(folder, row, message):
    work = folder / "data"
    work.mkdir()
    noise().save(folder / "private.png")
    noise().save(work / "a.png")
    for name, size, color in (("small", (16, 16), 255), ("white", (64, 32), 255), ("black", (64, 32), 100)):
        Image.new("L", size, color).save(work / f"{name}.png")
    for name, content in CONTENT.items():
        (work / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        plan(work, {"image": "a.png"}, row, **{"sampling.height": 32})
    assert str(error.value).startswith(f"{work}/prompts.jsonl:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["scale=2", "resample=nearest", "place=center", "feather=0"])
def test_settings_of_pictures_need_a_strength(folder, setting):
    with pytest.raises(UserError, match=r"sampling\.init\.\w+ has no effect without pictures; set .*init\.strength"):
        build_plan(load_job(overrides=[f"prompts.source={folder}/prompts.txt", f"sampling.init.{setting}"]))


def test_size_of_a_row_and_scale_exclude_each_other(folder):
    with pytest.raises(UserError, match=r":1: the row's size and sampling\.init\.scale=2 exclude each other"):
        plan(folder, {"image": "a.png", "height": 64, "width": 128}, **{"sampling.init.scale": 2})


def test_strength_zero_cannot_generate_around_a_picture(folder):
    with pytest.raises(UserError, match=r":1: sampling\.init\.strength=0 generates nothing around what is kept"):
        plan(folder, {"image": "a.png", "width": 128, "height": 32, "place": "center"}, strength=0)
