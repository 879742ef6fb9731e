"""The preview page and the contact sheet, over small shards written here with tarfile."""

import base64
import io
import json
import re
import tarfile

import pytest
from PIL import Image

from madgen.errors import UserError
from madgen.monitor import gallery

HOSTILE = "a <script>alert('1')</script> & \"quoted\" <!--\n</script\u2028> <img src=https://x.invalid onerror=x>"
SEED = 2**63 - 1


def picture(colour, width=640, height=160, suffix="png"):
    buffer = io.BytesIO()
    image = Image.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, width // 2, height // 2))
    image.save(buffer, format={"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix])
    return buffer.getvalue()


def add_shard(directory, number, prompts, order=("json", "picture", "txt"), suffix="png", finished=True, **shape):
    """A shard of one sample per prompt, keys `NNNN_II`; its sidecar only when it is finished."""
    path = directory / "shards" / f"pano-{number:06d}.tar"
    path.parent.mkdir(exist_ok=True)
    listed = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for index, prompt in enumerate(prompts):
            key = f"{number:04d}_{index:02d}"
            meta = {"key": key, "prompt": prompt, "seed": SEED, "sampler": {"name": "md", "sizes": [64, 8]}}
            image = picture((200, 40 * index % 256, 90), suffix=suffix, **shape)
            contents = {"json": json.dumps(meta).encode(), "picture": image, "txt": prompt.encode()}
            offset = tar.offset
            for kind in order:
                info = tarfile.TarInfo(f"{key}.{suffix if kind == 'picture' else kind}")
                info.size = len(contents[kind])
                tar.addfile(info, io.BytesIO(contents[kind]))
            listed.append({"key": key, "offset": offset, "size": tar.offset - offset, "prompt": prompt})
    if finished:
        path.with_suffix(".json").write_text(json.dumps({"samples": listed}))
    return path


@pytest.fixture
def directory(tmp_path):
    """A dataset of 1234 planned samples under the name of a hostile job; no shard yet."""
    path = tmp_path / "my data"
    path.mkdir()
    (path / "dataset.json").write_text(json.dumps({"job": {"name": "a<b>&{{max}}"}, "plan": {"samples": 1234}}))
    return path


def blocks(page):
    """The data blocks of a page as a browser delimits them: {id: parsed JSON}."""
    found = re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script', page, re.DOTALL | re.IGNORECASE)
    return {name: json.loads(text) for name, text in found}


def page_of(directory, **options):
    return gallery.write_gallery(directory, **options).read_text(encoding="utf-8")


def jpeg_of(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_hostile_prompt_is_escaped_and_round_trips(directory):
    add_shard(directory, 0, [HOSTILE])
    page = page_of(directory)
    data = blocks(page)
    assert data["index"][0]["prompt"] == HOSTILE
    assert ["prompt", HOSTILE] in data["s0"]["rows"]
    assert "alert(" in page
    for text in re.findall(r'<script type="application/json" id="\w+">(.*)</script>\n', page):
        assert not re.search("[<>&\u2028\u2029]", text)
    assert len(re.findall("<script", page, re.IGNORECASE)) == len(data) + 1 == 4


def test_title_is_escaped_and_counts_are_shown(directory):
    add_shard(directory, 0, ["one", "two"])
    page = page_of(directory, limit=1)
    assert "<title>a&lt;b&gt;&amp;{{max}} · madgen</title>" in page
    assert "2 of 1,234 panoramas done" in page
    assert "1 of them shown" in page
    assert 'value="2" max="1234"' in page


def test_page_is_self_contained(directory):
    add_shard(directory, 0, [HOSTILE, "plain"])
    page = gallery.DATA_MARK.join(re.split(r'<script type="application/json".*</script>\n', page_of(directory)))
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert not re.search(r"https?://", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//|\w+\.(js|css|png))""", page)
    assert not re.search(r"@import|url\(|innerHTML|document\.write|\bfetch\(", page)


def test_all_metadata_exact_and_command_quoted(directory):
    add_shard(directory, 0, ["one"], order=("picture", "txt", "json"))
    details = blocks(page_of(directory))["s0"]
    assert dict(details["rows"]) == {
        "key": "0000_00",
        "prompt": "one",
        "seed": str(SEED),
        "sampler.name": "md",
        "sampler.sizes": "[64, 8]",
    }
    assert details["command"] == f"madgen regenerate '{directory}' 0000_00 -o 0000_00.png"


@pytest.mark.parametrize(("suffix", "mime"), [("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")])
def test_pictures_and_thumbnails(directory, suffix, mime):
    add_shard(directory, 0, ["one"], suffix=suffix)
    data = blocks(page_of(directory))
    assert data["index"] == [{"key": "0000_00", "prompt": "one", "width": 640, "height": 160, "full": True}]
    assert data["f0"] == f"data:{mime};base64," + base64.b64encode(picture((200, 0, 90), suffix=suffix)).decode()
    assert jpeg_of(data["s0"]["thumbnail"]).size == (512, 128)


def test_beyond_the_budget_only_thumbnails(directory, monkeypatch):
    add_shard(directory, 0, ["one", "two", "three"])
    monkeypatch.setattr(gallery, "FULL_BYTES", len(picture((200, 0, 90))) + 10)
    data = blocks(page_of(directory))
    assert [entry["full"] for entry in data["index"]] == [True, False, False]
    assert set(data) == {"index", "s0", "s1", "s2", "f0"}
    assert (data["s1"]["shard"], data["s1"]["member"]) == ("shards/pano-000000.tar", "0000_01.png")
    assert jpeg_of(data["s1"]["thumbnail"]).size == (512, 128)


def test_unfinished_shard_is_skipped(directory):
    add_shard(directory, 0, ["one", "two"])
    add_shard(directory, 1, ["three"], finished=False)
    assert [entry["key"] for entry in blocks(page_of(directory))["index"]] == ["0000_00", "0000_01"]
    add_shard(directory, 1, ["three"])
    assert [entry["key"] for entry in blocks(page_of(directory))["index"]] == ["0000_00", "0000_01", "0001_00"]


def test_limit_is_spread_over_the_shards(directory):
    for number in range(3):
        add_shard(directory, number, ["one", "two", "three"])
    keys = [entry["key"] for entry in blocks(page_of(directory, limit=3))["index"]]
    assert keys == ["0000_00", "0001_01", "0002_02"]


def test_output_and_no_temporary_left(directory, tmp_path):
    add_shard(directory, 0, ["one"])
    assert gallery.write_gallery(directory) == directory / "preview.html"
    assert gallery.write_contact_sheet(directory) == directory / "preview.png"
    assert gallery.write_gallery(directory, tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["dataset.json", "preview.html", "preview.png", "shards"]


def test_page_is_replaced_at_once(directory):
    add_shard(directory, 0, ["one"])
    before = page_of(directory)
    with (directory / "preview.html").open(encoding="utf-8") as reader:
        add_shard(directory, 1, ["two"])
        after = page_of(directory)
        assert reader.read() == before != after


def test_failure_leaves_the_old_page(directory):
    shard = add_shard(directory, 0, ["one", "two"])
    before = page_of(directory)
    shard.write_bytes(shard.read_bytes()[:6000])
    with pytest.raises(UserError, match=r"pano-000000\.tar is damaged"):
        gallery.write_gallery(directory)
    assert (directory / "preview.html").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in directory.iterdir()) == ["dataset.json", "preview.html", "shards"]


@pytest.mark.parametrize(
    ("count", "shape", "columns", "rows"),
    [(3, (640, 160), 1, 3), (8, (640, 160), 1, 8), (9, (640, 160), 2, 5), (4, (64, 64), 2, 2)],
)
def test_contact_sheet_has_its_size_and_is_not_blank(directory, count, shape, columns, rows):
    width, height = shape
    add_shard(directory, 0, [HOSTILE * 9] * count, width=width, height=height)
    with Image.open(gallery.write_contact_sheet(directory)) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (columns * (max(width, 192) + 16) + 16, rows * (height + 24 + 16) + 16)
        assert sheet.getpixel((16 + width - 1, 16)) == (200, 0, 90)
        assert sheet.getpixel((16, 16 + height + 24 + 16)) == (255, 255, 255)
        caption = sheet.crop((16, 16 + height, 16 + max(width, 192), 16 + height + 24)).convert("L")
        assert caption.getextrema()[0] < 100
        margin = sheet.crop((16 + max(width, 192), 0, 32 + max(width, 192), sheet.height)).convert("L")
        assert len(set(margin.tobytes())) == 1


def test_contact_sheet_is_spread_and_limited(directory):
    add_shard(directory, 0, ["one"] * 5)
    with Image.open(gallery.write_contact_sheet(directory, limit=2)) as sheet:
        assert sheet.size == (640 + 32, 2 * 200 + 16)
        assert [sheet.getpixel((600, y)) for y in (100, 300)] == [(200, 0, 90), (200, 160, 90)]


@pytest.mark.parametrize("write", [gallery.write_gallery, gallery.write_contact_sheet])
def test_errors(directory, tmp_path, write):
    with pytest.raises(UserError) as none:
        write(tmp_path)
    assert str(none.value).startswith(f"{tmp_path} holds no madgen dataset (no dataset.json)")
    with pytest.raises(UserError, match="no finished sample yet"):
        write(directory)
    add_shard(directory, 0, ["one"], finished=False)
    with pytest.raises(UserError, match="no finished sample yet"):
        write(directory)
    add_shard(directory, 0, ["one"])
    with pytest.raises(UserError, match="limit=0"):
        write(directory, limit=0)
    (directory / "shards" / "pano-000000.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"pano-000000\.tar"):
        write(directory)
    (directory / "shards" / "pano-000000.json").write_text('{"samples": [{"key": "a"}]}')
    with pytest.raises(UserError, match="no list of samples"):
        write(directory)


def test_contact_sheet_refuses_more_than_it_holds(directory):
    add_shard(directory, 0, ["one"])
    with pytest.raises(UserError, match="at most 240"):
        gallery.write_contact_sheet(directory, limit=241)
