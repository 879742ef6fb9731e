"""The preview page as a file, and the contact sheet; `test_gallery_page.py` has the page in a browser."""

import base64
import hashlib
import io
import json
import os
import random
import re
import shlex

import pytest
from gallery_dataset import HOSTILE, SEED, add_shard, encoded, new_dataset, picture
from PIL import Image

from madgen.monitoring import gallery
from madgen.monitoring.gallery import blocks as blocks_module
from madgen.utils.errors import UserError


@pytest.fixture
def directory(tmp_path):
    """A dataset of 1234 planned samples under the name of a hostile job; no shard yet."""
    return new_dataset(tmp_path / "my data", name="a<b>&{{max}}/")


def blocks(page):
    """The data blocks of a page as a browser delimits them: {id: parsed JSON}."""
    found = re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script', page, re.DOTALL | re.IGNORECASE)
    return {name: json.loads(text, parse_constant=pytest.fail) for name, text in found}


def page_of(directory, **options):
    return gallery.write_gallery(directory, **options).read_text(encoding="utf-8")


def samples_of(directory, **options):
    return blocks(page_of(directory, **options))["index"]["samples"]


def image_of(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_hostile_prompt_is_escaped_and_round_trips(directory):
    add_shard(directory, 0, [HOSTILE])
    page = page_of(directory)
    data = blocks(page)
    assert data["index"]["samples"][0]["prompt"] == HOSTILE
    assert ["prompt", HOSTILE] in data["s0"]["rows"]
    assert "alert(" in page
    for text in re.findall(r'<script type="application/json" id="\w+">(.*)</script>\n', page):
        assert not re.search("[<>&\u2028\u2029]", text)
    assert len(re.findall("<script", page, re.IGNORECASE)) == len(data) + 1 == 4


def test_title_is_escaped_and_counts_are_shown(directory):
    add_shard(directory, 0, ["one", "two"])
    page = page_of(directory, limit=1)
    assert "<title>a&lt;b&gt;&amp;{{max}}/ · madgen</title>" in page
    assert "2 of 1,234 panoramas done" in page
    assert "1 of them here, evenly spaced · 160×640 px" in page
    assert 'value="2" max="1234"' in page


def test_page_is_self_contained(directory):
    add_shard(directory, 0, [HOSTILE, "plain"])
    page = "".join(re.split(r'<script type="application/json".*</script>\n', page_of(directory)))
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert not re.search(r"https?://", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//|\w+\.(js|css|png))""", page)
    assert not re.search(r"@import|url\(|innerHTML|document\.write|\bfetch\(", page)


def test_policy_allows_only_the_embedded_script_and_style(directory):
    add_shard(directory, 0, ["one"])
    page = page_of(directory)
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="([^"]*)"', page)
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src &#x27;sha256-{digest}&#x27;;" in policy
    assert "unsafe" not in policy


def test_metadata_is_exact_and_command_is_quoted(directory):
    add_shard(directory, 0, ["one"], order=("picture", "txt", "json"))
    details = blocks(page_of(directory))["s0"]
    assert dict(details["rows"]) == {
        "key": "0000_00",
        "prompt": "one",
        "seed": str(SEED),
        "sampling.loop": "false",
        "sampling.sizes": "[64, 8]",
    }
    assert details["command"] == f"madgen regenerate '{directory}' 0000_00 -o 0000_00.png"


@pytest.mark.parametrize(("suffix", "mime"), [("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")])
def test_images_and_thumbnails_are_embedded(directory, suffix, mime):
    add_shard(directory, 0, ["one"], suffix=suffix, scores=[{"seam": 1.25}])
    data = blocks(page_of(directory))
    assert data["index"]["samples"] == [
        {"key": "0000_00", "prompt": "one", "width": 640, "height": 160, "scores": {"seam": 1.25}}
    ]
    assert data["index"]["scores"] == [{"name": "seam", "lower": True}]
    assert data["f0"] == f"data:{mime};base64," + base64.b64encode(picture((200, 0, 90), suffix=suffix)).decode()
    assert image_of(data["s0"]["thumbnail"]).size == (512, 128)


@pytest.mark.parametrize(("width", "height", "thumbnail"), [(320, 1280, (128, 512)), (64, 64, (64, 64))])
def test_thumbnails_of_tall_and_small_images(directory, width, height, thumbnail):
    add_shard(directory, 0, ["one"], width=width, height=height)
    assert image_of(blocks(page_of(directory))["s0"]["thumbnail"]).size == thumbnail


def test_budget_selects_originals_previews_or_thumbnails(directory):
    """All samples alike, the best that fits; pictures of noise, so that fewer pixels are fewer bytes."""
    rng = random.Random(0)
    noise = [encoded(Image.frombytes("RGB", (1200, 600), rng.randbytes(3 * 1200 * 600))) for _ in range(3)]
    shard = add_shard(directory, 0, ["one", "two", "three"], pictures=noise, width=1200, height=600)
    total, shown = shard.stat().st_size, []
    for budget in (total, total // 2, total // 8, 1000):
        data = blocks(page_of(directory, budget=budget))
        embedded = [data.get(f"f{number}") for number in range(3)]
        (side,) = {data[f"s{number}"]["preview"] for number in range(3)}
        assert all(image_of(uri).size == (2 * side, side) for uri in embedded if side)
        assert sum(len(uri or "") for uri in embedded) <= 1.4 * budget  # base64, and an estimate
        shown.append(side)
    assert shown == [0, 512, 256, None]
    assert embedded == [None] * 3
    assert (data["s1"]["shard"], data["s1"]["member"]) == ("pano-000000.tar", "0000_01.png")
    with shard.open("rb") as file:
        file.seek(data["s1"]["offset"])
        assert noise[1] in file.read(data["s1"]["size"])


def test_large_page_is_in_order_and_reads_little_ahead(directory, monkeypatch):
    """What was read and is not yet written is in memory: at most two samples a core, however many there are."""
    add_shard(directory, 0, [f"number {number}" for number in range(60)], width=64, height=16)
    started, told, ahead = [], [], []

    def counted(dataset, entry):
        started.append(entry)
        ahead.append(len(started) - len(told))
        return read(dataset, entry)

    read = blocks_module.read
    monkeypatch.setattr(blocks_module, "read", counted)
    data = blocks(page_of(directory, progress=lambda *done: told.append(done)))
    assert [dict(data[f"s{number}"]["rows"])["prompt"] for number in range(60)] == [f"number {n}" for n in range(60)]
    assert told == [(number, 60) for number in range(1, 61)]
    assert max(ahead) <= 2 * len(os.sched_getaffinity(0)) < 60 or len(os.sched_getaffinity(0)) >= 30


def test_unfinished_shard_is_skipped(directory):
    add_shard(directory, 0, ["one", "two"])
    add_shard(directory, 1, ["three"], finished=False)
    assert [sample["key"] for sample in samples_of(directory)] == ["0000_00", "0000_01"]
    add_shard(directory, 1, ["three"])
    assert [sample["key"] for sample in samples_of(directory)] == ["0000_00", "0000_01", "0001_00"]


def test_limit_is_spread_over_the_shards(directory):
    for number in range(3):
        add_shard(directory, number, ["one", "two", "three"])
    keys = [sample["key"] for sample in samples_of(directory, limit=3)]
    assert keys == ["0000_00", "0001_01", "0002_02"]


def test_output_leaves_no_temporary_file(directory, tmp_path):
    add_shard(directory, 0, ["one"])
    assert gallery.write_gallery(directory) == directory / "preview.html"
    assert gallery.write_contact_sheet(directory) == directory / "preview.png"
    assert gallery.write_gallery(directory, tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["dataset.json", "preview.html", "preview.png", "shards"]


def test_page_is_replaced_by_rename(directory):
    add_shard(directory, 0, ["one"])
    before = page_of(directory)
    with (directory / "preview.html").open(encoding="utf-8") as reader:
        add_shard(directory, 1, ["two"])
        after = page_of(directory)
        assert reader.read() == before != after


def test_failure_keeps_the_old_page(directory):
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
def test_contact_sheet_has_the_expected_size_and_content(directory, count, shape, columns, rows):
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
def test_errors_name_the_cause(directory, tmp_path, write):
    with pytest.raises(UserError) as none:
        write(tmp_path)
    assert str(none.value).startswith(f"{tmp_path} holds no madgen dataset (no dataset.json)")
    with pytest.raises(UserError, match="no samples yet"):
        write(directory)
    add_shard(directory, 0, ["one"], finished=False)
    with pytest.raises(UserError, match="no samples yet"):
        write(directory)
    add_shard(directory, 0, ["one"])
    with pytest.raises(UserError, match="limit must be >= 1, got 0"):
        write(directory, limit=0)
    (directory / "shards" / "pano-000000.tar").write_text("no tar", encoding="utf-8")
    with pytest.raises(UserError, match=r"pano-000000\.tar"):
        write(directory)
    (directory / "shards" / "pano-000000.json").write_text('{"samples": [{"key": "a"}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"pano-000000\.json is damaged: shard is missing"):
        write(directory)


def test_contact_sheet_refuses_large_limits(directory):
    add_shard(directory, 0, ["one"])
    with pytest.raises(UserError, match="at most 240"):
        gallery.write_contact_sheet(directory, limit=241)


def test_non_finite_scores_are_left_out(directory):
    add_shard(directory, 0, ["one", "two"], scores=[{"seam": float("nan")}, {"seam": 1.0}])
    data = blocks(page_of(directory))["index"]
    assert [sample["scores"] for sample in data["samples"]] == [{}, {"seam": 1.0}]
    assert [score["name"] for score in data["scores"]] == ["seam"]


def test_command_of_a_real_dataset_regenerates_the_sample(madgen_here, job_file, tmp_path):
    options = ["prompts.limit=1", "sampling.loop=true", "sampling.width=96"]
    assert madgen_here("generate", job_file, *options).code == 0
    result = madgen_here("preview", "out")
    assert (result.code, result.out.split()) == (0, ["out/preview.html", "out/preview.png"])
    data = blocks((tmp_path / "out/preview.html").read_text(encoding="utf-8"))
    assert [score["name"] for score in data["index"]["scores"]] == [*data["index"]["samples"][0]["scores"]]
    assert {"seam", "wrap"} <= data["index"]["samples"][0]["scores"].keys()
    assert data["s0"]["loop"] is True
    assert madgen_here("preview", "out", "--megabytes", 0, "--limit", 1).code == 0
    assert blocks((tmp_path / "out/preview.html").read_text(encoding="utf-8")).keys() == {"index", "s0"}
    program, *arguments = shlex.split(data["s0"]["command"])
    assert program == "madgen"
    assert madgen_here(*arguments).code == 0
    assert (tmp_path / arguments[-1]).exists()
