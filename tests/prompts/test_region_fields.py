import json

import pytest
from PIL import Image

from madgen import UserError, load_job
from madgen.dataset.plan import build_plan
from madgen.prompts.reading import read_prompts
from madgen.prompts.regions import region_identity
from madgen.types import Box, MaskFile, Ramp, Region

DEFAULTS = {"negative_prompt": "fog", "height": 32, "width": 64}


def read(tmp_path, *lines, **options):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_prompts(str(tmp_path / "prompts.jsonl"), **DEFAULTS, **options)


def test_boxes_and_mask_files_of_a_line(tmp_path):
    Image.new("L", (64, 32), 255).save(tmp_path / "mask.png")
    regions = [
        {"mask": [0, 0, 8, 8], "prompt": "a hut"},
        {"mask": "mask.png", "prompt": "a lake", "negative_prompt": "ice"},
    ]
    (prompt,) = read(tmp_path, {"prompt": "a valley", "regions": regions})
    box, picture = prompt.regions
    assert box == Region(Box(0, 0, 8, 8), "a hut", "fog")  # the line's, unless it has its own
    assert picture.text == "a lake"
    assert picture.negative == "ice"
    assert picture.mask.path == str(tmp_path / "mask.png")
    assert len(picture.mask.sha256) == 64


def test_prompts_across_the_width_start_with_the_line_itself(tmp_path):
    (prompt,) = read(tmp_path, {"prompt": "a valley", "across": ["hills", "the sea"]})
    assert prompt.text == "a valley"
    assert prompt.regions == (Region(Ramp(1, 3), "hills", "fog"), Region(Ramp(2, 3), "the sea", "fog"))


def test_a_lines_own_regions_replace_the_jobs(tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b", "regions": []}, {"prompt": "c", "across": ["d"]}]
    shared = [{"mask": [0, 0, 8, 8], "prompt": "a hut"}]
    first, second, third = read(tmp_path, *lines, regions=shared)
    assert [region.text for region in first.regions] == ["a hut"]
    assert second.regions == ()
    assert [region.text for region in third.regions] == ["d"]


def test_identity_is_a_masks_content_not_its_name():
    one, other = (Region(MaskFile(path, "same"), "a hut") for path in ("a.png", "b.png"))
    assert region_identity(one) == region_identity(other)
    assert region_identity(one) != region_identity(Region(MaskFile("a.png", "else"), "a hut"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regions": [{"mask": [0, 0, 8], "prompt": "x"}]}, r"region 1: mask must be \[left, top, right, bottom\]"),
        ({"regions": [{"mask": [0, 0, 8, 0.5], "prompt": "x"}]}, "mask must be"),
        ({"regions": [{"mask": "none.png", "prompt": "x"}]}, "no mask file none.png"),
        ({"regions": [{"mask": [0, 0, 8, 8]}]}, "region 1: the prompt must be a text"),
        ({"regions": [{"mask": [0, 0, 8, 8], "promt": "x"}]}, "unknown field 'promt'"),
        ({"regions": ["x"]}, "must be an object with mask, prompt, negative_prompt"),
        ({"regions": "x"}, "must be lists"),
        ({"across": [""]}, "a prompt of across must be a text"),
        ({"across": ["x"], "regions": [{"mask": [0, 0, 8, 8], "prompt": "x"}]}, "exclude each other"),
    ],
)
def test_bad_regions_are_refused_with_their_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=f"prompts.jsonl:1.*{message}"):
        read(tmp_path, {"prompt": "a valley", **fields})


def test_an_empty_negative_prompt_switches_the_lines_off(tmp_path):
    region = {"mask": [0, 0, 8, 8], "prompt": "a hut", "negative_prompt": ""}
    (prompt,) = read(tmp_path, {"prompt": "a valley", "regions": [region]})
    assert prompt.regions[0].negative == ""


def test_a_jobs_masks_are_found_beside_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "jobs/masks").mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a valley\n")
    Image.new("L", (64, 32), 255).save(tmp_path / "jobs/masks/lake.png")
    (tmp_path / "jobs/job.yaml").write_text("prompts: {regions: [{mask: masks/lake.png, prompt: a lake}]}\n")
    monkeypatch.chdir(tmp_path)
    job = load_job("jobs/job.yaml", ["prompts.source=prompts.txt"])
    (prompt,) = build_plan(job).prompts
    assert prompt.regions[0].mask.path == str(tmp_path / "jobs/masks/lake.png")


def test_rows_with_regions_name_the_jobs_own_once_a_size(tmp_path):
    own = [{"mask": [0, 0, 4, 4], "prompt": "own"}]
    lines = [
        {"prompt": "a"}, {"prompt": "b", "regions": []}, {"prompt": "c"}, {"prompt": "d", "width": 128},
        {"prompt": "e", "regions": own}, {"prompt": "f", "width": 128}, {"prompt": "g", "negative_prompt": "ice"},
    ]  # fmt: skip
    table = read(tmp_path, *lines, regions=[{"mask": [0, 0, 8, 8], "prompt": "a hut"}], batch_rows=2)
    assert list(table.rows_with_regions()) == [0, 3, 4, 6]
    assert [region.negative for region in table[6].regions] == ["ice"]  # the line's, which the job's region takes
    assert dict(table.header.totals.texts) == {(32, 64): 2 + 1 + 2 + 2 + 2, (32, 128): 2 + 2}


def test_the_jobs_regions_are_not_missed_where_every_line_has_its_own(tmp_path):
    lost = [{"mask": "none.png", "prompt": "a hut"}]
    assert len(read(tmp_path, {"prompt": "a", "across": ["b"]}, regions=lost)) == 1
    with pytest.raises(UserError, match=r"prompts.jsonl:2: region 1: there is no mask file none.png"):
        read(tmp_path, {"prompt": "a", "across": ["b"]}, {"prompt": "c"}, regions=lost)
