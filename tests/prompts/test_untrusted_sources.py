"""Untrusted prompt files."""

import gzip
import json

import pytest
from PIL import Image

from madgen import load_job
from madgen.dataset.plan import build_plan
from madgen.prompts.readers import _lines
from madgen.prompts.regions import parse_regions
from madgen.utils.errors import UserError


def texts(source):
    return [prompt.text for prompt in build_plan(load_job(overrides=[f"prompts.source={source}"])).prompts]


def folder_that_reads(tmp_path, data_files):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.jsonl").write_text('{"prompt": "own"}\n', encoding="utf-8")
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret"}\n', encoding="utf-8")
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.mark.parametrize("data_files", ["../secret.jsonl", "{tmp_path}/secret.jsonl", "link.jsonl"])
def test_a_dataset_folder_reads_no_file_outside(data_files, tmp_path):
    folder = folder_that_reads(tmp_path, data_files.format(tmp_path=tmp_path))
    (folder / "link.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(UserError, match=r"secret\.jsonl|link\.jsonl") as error:
        texts(f"hf://{folder}")
    assert "outside the folder" in str(error.value)


def test_a_saved_dataset_reads_no_file_outside(tmp_path):
    import datasets

    for name in ("saved", "secret"):
        datasets.Dataset.from_dict({"prompt": [name]}).save_to_disk(tmp_path / name)
    assert texts(f"hf://{tmp_path}/saved") == ["saved"]
    state = tmp_path / "saved" / "state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    content["_data_files"] = [{"filename": f"../secret/{file['filename']}"} for file in content["_data_files"]]
    state.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="outside the folder"):
        texts(f"hf://{tmp_path}/saved")


def test_a_dataset_folder_may_name_its_own_files(tmp_path):
    assert texts(f"hf://{folder_that_reads(tmp_path, 'own.jsonl')}") == ["own"]


@pytest.mark.parametrize("ending", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("last", ["", "x"])
def test_every_line_ending_ends_a_line(ending, last, tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_bytes((ending.join(["hills", "sea", last]) if last else f"hills{ending}sea{ending}").encode())
    assert texts(source) == ["hills", "sea", *filter(None, [last])]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.csv", b"id,prompt\r1,hills\r2,sea\r"), ("p.jsonl", b'{"prompt": "hills"}\r{"prompt": "sea"}\r')],
)
def test_tables_may_end_lines_with_carriage_returns(name, content, tmp_path):
    source = tmp_path / name
    source.write_bytes(content)
    assert texts(source) == ["hills", "sea"]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
def test_line_endings_may_straddle_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(_lines, "BLOCK", block)
    source = tmp_path / "prompts.txt"
    source.write_bytes(b"a\r\nbb\rcc\r\r\ndd\n\ree\r")
    assert texts(source) == ["a", "bb", "cc", "dd", "ee"]


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_lines, "MAX_TEXT", 4 << 20)
    source = tmp_path / "prompts.json.gz"
    source.write_bytes(gzip.compress(b" " * (6 << 20)))
    with pytest.raises(UserError, match=r"use \.jsonl"):
        texts(source)


@pytest.mark.parametrize("mask", ["/proc/self/status", "/dev/zero"])
def test_masks_are_regular_files_with_content(mask, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(f'{{"prompt": "hills", "regions": [{{"mask": "{mask}", "prompt": "x"}}]}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"mask file .* (is empty|is not a regular file)"):
        texts(source)


def with_mask(folder, mask):
    """Write a prompt file whose second line names a mask."""
    folder.mkdir(exist_ok=True)
    lines = [{"prompt": "hills"}, {"prompt": "sea", "regions": [{"mask": str(mask), "prompt": "x"}]}]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "p.jsonl"


@pytest.mark.parametrize("mask", ["../private.png", "{tmp_path}/private.png", "link.png", "sub/../../private.png"])
@pytest.mark.parametrize("scheme", ["", "hf://"])
def test_masks_outside_the_folder_of_the_prompt_file_are_refused(scheme, mask, tmp_path, monkeypatch):
    Image.new("L", (64, 32), 255).save(tmp_path / "private.png")
    source = with_mask(tmp_path / "data", mask.format(tmp_path=tmp_path))
    (tmp_path / "data" / "sub").mkdir()
    (tmp_path / "data" / "link.png").symlink_to("../private.png")
    source = f"{scheme}{source.parent}" if scheme else str(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r":2: region 1: mask file .* is outside the folder of the prompt file"):
        texts(source)
    job = load_job(overrides=[f"prompts.source={source}", "prompts.allow_masks_outside=true"])
    assert build_plan(job).prompts[1].regions[0].mask.path == str(tmp_path / "private.png")


def test_masks_in_the_current_directory_are_outside_the_folder_of_the_prompt_file(tmp_path, monkeypatch):
    Image.new("L", (64, 32), 255).save(tmp_path / "private.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"p\.jsonl:2: region 1: mask file private\.png is outside"):
        texts(with_mask(tmp_path / "data", "private.png"))


def test_masks_inside_the_folder_of_the_prompt_file_are_read(tmp_path, monkeypatch):
    (tmp_path / "data" / "masks").mkdir(parents=True)
    Image.new("L", (64, 32), 255).save(tmp_path / "data" / "masks" / "a.png")
    (tmp_path / "alias").symlink_to("data")
    for folder, mask in (("data", "masks/a.png"), ("alias", "masks/a.png"), ("data", tmp_path / "alias/masks/a.png")):
        (prompt,) = build_plan(load_job(overrides=[f"prompts.source={with_mask(tmp_path / folder, mask)}"])).prompts[1:]
        assert prompt.regions[0].mask.path == str(tmp_path / "data/masks/a.png")


def test_a_dataset_on_the_hub_names_no_file_of_this_machine(tmp_path, monkeypatch):
    Image.new("L", (64, 32), 255).save(tmp_path / "private.png")
    monkeypatch.chdir(tmp_path)
    fields = {"regions": [{"mask": "private.png", "prompt": "x"}], "negative_prompt": ""}
    with pytest.raises(UserError, match="is outside a dataset of the Hub"):
        parse_regions("row", fields, None, confined=True)


def test_masks_of_the_job_itself_may_be_anywhere(tmp_path):
    Image.new("L", (64, 32), 255).save(tmp_path / "mask.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p.txt").write_text("hills\n", encoding="utf-8")
    region = f"prompts.regions=[{{mask: {tmp_path}/mask.png, prompt: x}}]"
    (prompt,) = build_plan(load_job(overrides=[f"prompts.source={tmp_path}/data/p.txt", region])).prompts
    assert prompt.regions[0].mask.path == str(tmp_path / "mask.png")
