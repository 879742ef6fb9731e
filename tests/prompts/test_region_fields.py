import json

import pytest
from PIL import Image

from madgen import UserError, load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset.plan import build_plan
from madgen.prompts.builder import BATCH_ROWS
from madgen.prompts.reading import read_prompts
from madgen.prompts.regions import region_identity
from madgen.types import Box, MaskFile, Ramp, Region


def read(tmp_path, *lines, batch_rows=BATCH_ROWS, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return read_prompts(PromptsConfig(source=str(path), negative_prompt="fog", **options), 32, 64, batch_rows)


def test_row_with_boxes_and_mask_files(tmp_path):
    Image.new("L", (64, 32), 255).save(tmp_path / "mask.png")
    regions = [
        {"mask": [0, 0, 8, 8], "prompt": "a hut"},
        {"mask": "mask.png", "prompt": "a lake", "negative_prompt": "ice"},
    ]
    (prompt,) = read(tmp_path, {"prompt": "a valley", "regions": regions})
    box, picture = prompt.regions
    assert box == Region(Box(0, 0, 8, 8), "a hut", "fog")  # inherited from the row
    assert picture.text == "a lake"
    assert picture.negative == "ice"
    assert picture.mask.path == str(tmp_path / "mask.png")
    assert len(picture.mask.sha256) == 64


def test_across_starts_with_the_prompt_of_the_row(tmp_path):
    (prompt,) = read(tmp_path, {"prompt": "a valley", "across": ["hills", "the sea"]})
    assert prompt.text == "a valley"
    assert prompt.regions == (Region(Ramp(1, 3), "hills", "fog"), Region(Ramp(2, 3), "the sea", "fog"))


def test_regions_of_a_row_replace_those_of_the_job(tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b", "regions": []}, {"prompt": "c", "across": ["d"]}]
    shared = [{"mask": [0, 0, 8, 8], "prompt": "a hut"}]
    first, second, third = read(tmp_path, *lines, regions=shared)
    assert [region.text for region in first.regions] == ["a hut"]
    assert second.regions == ()
    assert [region.text for region in third.regions] == ["d"]


def test_region_identity_depends_on_mask_content_not_path():
    one, other = (Region(MaskFile(path, "same"), "a hut") for path in ("a.png", "b.png"))
    assert region_identity(one) == region_identity(other)
    assert region_identity(one) != region_identity(Region(MaskFile("a.png", "else"), "a hut"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regions": [{"mask": [0, 0, 8], "prompt": "x"}]}, r"region 1: mask must be \[left, top, right, bottom\]"),
        ({"regions": [{"mask": [0, 0, 8, 0.5], "prompt": "x"}]}, "mask must be"),
        ({"regions": [{"mask": "none.png", "prompt": "x"}]}, "mask file none.png exists neither"),
        ({"regions": [{"mask": [0, 0, 8, 8]}]}, "region 1: the prompt must be a non-empty string"),
        ({"regions": [{"mask": [0, 0, 8, 8], "promt": "x"}]}, "unknown field 'promt'"),
        ({"regions": ["x"]}, "must be an object with mask, prompt, negative_prompt"),
        ({"regions": "x"}, "must be lists"),
        ({"across": [""]}, "each prompt of across must be a non-empty string"),
        ({"across": ["x"], "regions": [{"mask": [0, 0, 8, 8], "prompt": "x"}]}, "exclude each other"),
    ],
)
def test_invalid_regions_are_refused_with_their_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=f"prompts.jsonl:1.*{message}"):
        read(tmp_path, {"prompt": "a valley", **fields})


def test_empty_negative_prompt_of_a_region_overrides_the_row(tmp_path):
    region = {"mask": [0, 0, 8, 8], "prompt": "a hut", "negative_prompt": ""}
    (prompt,) = read(tmp_path, {"prompt": "a valley", "regions": [region]})
    assert prompt.regions[0].negative == ""


def test_masks_of_a_job_are_resolved_against_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "jobs/masks").mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a valley\n", encoding="utf-8")
    Image.new("L", (64, 32), 255).save(tmp_path / "jobs/masks/lake.png")
    (tmp_path / "jobs/job.yaml").write_text(
        "prompts: {regions: [{mask: masks/lake.png, prompt: a lake}]}\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    job = load_job("jobs/job.yaml", ["prompts.source=prompts.txt"])
    (prompt,) = build_plan(job).prompts
    assert prompt.regions[0].mask.path == str(tmp_path / "jobs/masks/lake.png")


def test_rows_with_regions_yields_the_regions_of_the_job_once_per_size(tmp_path):
    own = [{"mask": [0, 0, 4, 4], "prompt": "own"}]
    lines = [
        {"prompt": "a"}, {"prompt": "b", "regions": []}, {"prompt": "c"}, {"prompt": "d", "width": 128},
        {"prompt": "e", "regions": own}, {"prompt": "f", "width": 128}, {"prompt": "g", "negative_prompt": "ice"},
    ]  # fmt: skip
    table = read(tmp_path, *lines, regions=[{"mask": [0, 0, 8, 8], "prompt": "a hut"}], batch_rows=2)
    assert list(table.rows_with_regions()) == [0, 3, 4, 6]
    assert [region.negative for region in table[6].regions] == ["ice"]  # the job's region inherits it from the row
    texts = {size: counts.texts for size, counts in table.header.totals.sizes.items()}
    assert texts == {(32, 64): 2 + 1 + 2 + 2 + 2, (32, 128): 2 + 2}


def test_invalid_regions_of_the_job_are_refused_only_if_a_row_uses_them(tmp_path):
    lost = [{"mask": "none.png", "prompt": "a hut"}]
    assert len(read(tmp_path, {"prompt": "a", "across": ["b"]}, regions=lost)) == 1
    with pytest.raises(UserError, match=r"prompts.jsonl:2: region 1: mask file none.png exists neither in"):
        read(tmp_path, {"prompt": "a", "across": ["b"]}, {"prompt": "c"}, regions=lost)
