"""Pictures of every kind, as image, mask, control and style picture, and in Python: right pixels, or one clear line."""

import io
import json
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from madgen import PanoramaSampler, UserError, load_job
from madgen.dataset.plan import build_plan
from madgen.images.decoding import decode_picture, read_mask, read_picture
from madgen.sampling.picture_arguments import parse_image

RGB = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
GRAY = RGB[..., 0]


def png(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def deep_color():
    """Return a PNG of 16 bits per channel, which Pillow reads with 8."""
    import struct
    import zlib

    rows = b"".join(b"\0" + row.tobytes() for row in RGB.astype(">u2") * 257)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 64, 32, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def palette():
    """Return a palette PNG whose first color is transparent, and its pixels."""
    image = Image.fromarray(RGB).quantize(16)
    return png(image, transparency=0), np.asarray(image.convert("RGB"))


def upright_photo():
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(Image.fromarray(np.rot90(RGB)), exif=exif)


ALPHA = Image.fromarray(np.dstack([RGB, GRAY]))
CMYK = Image.fromarray(RGB).convert("CMYK")
GOOD = {
    "gray": (png(Image.fromarray(GRAY)), np.dstack([GRAY] * 3)),
    "bits": (png(Image.fromarray(GRAY > 128)), np.dstack([255 * (GRAY > 128)] * 3)),
    "palette": palette(),
    "alpha": (png(ALPHA), RGB),
    "gray and alpha": (png(Image.fromarray(np.dstack([GRAY, GRAY]), "LA")), np.dstack([GRAY] * 3)),
    "CMYK": (png(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB"))),
    "turned": (upright_photo(), RGB),
    "webp": (png(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "bmp": (png(Image.fromarray(RGB), "BMP"), RGB),
}
FRAMES = [Image.fromarray(np.roll(RGB, n, 1)) for n in range(3)]
BAD = {
    "16 bits": (png(Image.fromarray(GRAY.astype(np.uint16) * 257)), "has more than 8 bits per channel; save it with 8"),
    "16 bits per color": (deep_color(), "has more than 8 bits per channel"),
    "floats": (png(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), "has more than 8 bits per channel"),
    "gif": (png(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "has 3 frames; save the one to use"),
    "webp": (png(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "has 3 frames"),
    "apng": (png(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "has 3 frames"),
    "tiff": (png(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "has 3 frames"),
    "cut": (png(Image.fromarray(RGB))[:1000], "cannot read the"),
    "cut jpeg": (png(Image.fromarray(RGB), "JPEG")[:1000], "cannot read the"),
    "no size": (
        png(Image.fromarray(RGB)).replace(b"\0\0\0@\0\0\0 ", b"\0\0\0@\0\0\0\0"),
        "cannot read the|has no pixels",
    ),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it is not a picture"),
    "zeros": (bytes(1000), "it is not a picture"),
}


@pytest.mark.parametrize("name", list(GOOD))
def test_pixels_are_those_of_the_picture(tmp_path, name):
    content, expected = GOOD[name]
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hills", "image": "a"}\n', encoding="utf-8")
    job = load_job(overrides=[f"prompts.source={tmp_path}/p.jsonl", "sampling.init.strength=0.5"])
    (prompt,) = build_plan(job).prompts
    picture = prompt.pictures["image"]
    assert (picture.height, picture.width) == expected.shape[:2]
    assert np.array_equal(np.asarray(read_picture(picture)), expected)
    for argument in (tmp_path / "a", Image.open(io.BytesIO(content))):
        assert np.array_equal(np.asarray(parse_image("images", argument)), expected)


COLUMNS = {
    "image": ["sampling.init.strength=1"],
    "mask": ["sampling.init.strength=1"],
    "control": ["backbone.controlnet.weights=control"],
    "style": ["backbone.ip_adapter.weights=style"],
}


def refused(tmp_path, column, settings, value):
    """Plan a job whose second row names a bad picture; return the message."""
    (tmp_path / "good.png").write_bytes(GOOD["gray"][0])
    needed = "image" if column == "mask" else column
    rows = [{"prompt": "hills", needed: "good.png"}, {"prompt": "sea", needed: "good.png", column: value}]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as error:
        build_plan(load_job(overrides=[f"prompts.source={source}", *settings]))
    message = str(error.value)
    assert message.startswith(f"{source}:2: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("column", list(COLUMNS))
def test_pictures_that_cannot_be_read_are_refused_by_their_line(tmp_path, column):
    import re

    for content, expected in BAD.values():
        (tmp_path / "bad").write_bytes(content)
        os.utime(tmp_path / "bad", ns=(len(content), len(content)))
        message = refused(tmp_path, column, COLUMNS[column], "bad")
        assert re.search(expected, message), message
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, expected in (
        ("pipe", "pipe is not a regular file"), ("empty", "empty is empty"), ("link", "link is a broken link"),
        (".", "is a directory; name a picture in it"), ("none.png", "none.png exists neither in"),
        ("x" * 300, ""), ("a\nb.png", "'a\\nb.png' exists neither in"), ("\udcff.png", ""), ("a\0b", "NUL"),
        (7, "must be the name of a picture file, got 7"),
        ("https://example.com/a.png", "prompts.allow_picture_urls=[https://example.com/]"),
    ):  # fmt: skip
        assert expected in refused(tmp_path, column, COLUMNS[column], name)


@pytest.mark.parametrize("column", list(COLUMNS))
def test_large_files_are_not_read_into_memory(tmp_path, column):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(40 << 30)  # sparse
    tracemalloc.start()
    try:
        assert "has more than 512 MiB" in refused(tmp_path, column, COLUMNS[column], "large.png")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("mode", "known"),
    [("1", True), ("L", True), ("P", True), ("RGB", True), ("RGBA", True), ("CMYK", True), ("LA", True)],
)
def test_masks_of_every_mode_keep_what_is_white(tmp_path, mode, known):
    gray = Image.new("L", (64, 32))
    gray.paste(255, (0, 0, 32, 32))
    mask = gray.convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    mask.save(tmp_path / "mask", format=form)
    (tmp_path / "a.png").write_bytes(GOOD["gray"][0])
    (tmp_path / "p.jsonl").write_text('{"prompt": "hills", "image": "a.png", "mask": "mask"}\n', encoding="utf-8")
    job = load_job(overrides=[f"prompts.source={tmp_path}/p.jsonl", "sampling.init.strength=1"])
    (prompt,) = build_plan(job).prompts
    assert np.array_equal(np.asarray(read_mask(prompt.pictures["mask"])) >= 128, np.asarray(gray) >= 128)


def test_transparent_parts_of_masks_are_not_kept():
    mask = Image.new("RGBA", (64, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 16, 32))
    content = png(mask)
    from madgen.images.decoding import as_mask

    kept = np.asarray(as_mask(decode_picture(content, "mask", "m"))) >= 128
    assert kept[:, :16].all()
    assert not kept[:, 16:].any()


@pytest.mark.parametrize("name", ["16 bits", "16 bits per color", "floats", "gif", "cut", "cut jpeg"])
def test_python_refuses_the_same_pictures(tiny, name):
    content, message = BAD[name]
    with pytest.raises(UserError, match=message.replace("cannot read the", "cannot read")):
        parse_image("images", Image.open(io.BytesIO(content)))


def test_damaged_mask_in_python_is_refused(tiny):
    sampler = PanoramaSampler.from_pretrained(tiny, stride=4)
    with pytest.raises(UserError, match="masks: cannot read a picture"):
        sampler.sample(
            ["hills"], images=[RGB], masks=[Image.open(io.BytesIO(BAD["cut"][0]))], strength=1.0, seeds=[0],
            num_inference_steps=2,
        )  # fmt: skip
