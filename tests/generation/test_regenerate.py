import json
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_sample_is_regenerated_from_its_json(madgen, job_file, tmp_path, image_format):
    assert madgen("generate", job_file, "prompts.limit=1", f"output.format={image_format}").code == 0
    key = json.loads((tmp_path / "out/shards/job-000000.json").read_text())["samples"][1]["key"]
    result = madgen("regenerate", "out", key, "-o", "again.png")
    assert (result.code, "the same pixels" in result.out) == (0, True), result.err
    if image_format == "png":
        with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
            stored = np.asarray(Image.open(tar.extractfile(f"{key}.png")))
        assert np.array_equal(stored, np.asarray(Image.open(tmp_path / "again.png")))


def test_looped_panorama_with_regions_is_regenerated_without_its_mask_file(madgen, job_file, tmp_path):
    mask = Image.new("L", (64, 32))
    mask.paste(255, (20, 8, 44, 30))
    mask.save(tmp_path / "mask.png")
    regions = [{"mask": "mask.png", "prompt": "the sea"}, {"mask": [0, 0, 10, 12], "prompt": "dunes"}]
    first = {"prompt": "a hill", "regions": regions}
    lines = [first, {"prompt": "a meadow", "across": ["snow"]}, {"prompt": "a forest"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = (job_file, "prompts.source=prompts.jsonl", "prompts.samples_per_prompt=1", "sampling.loop=true")
    made = madgen("generate", *job, "method.regions.bootstrapping=1", "sampling.batch_size=3")
    assert made.code == 0, made.err
    (tmp_path / "mask.png").unlink()
    samples = json.loads((tmp_path / "out/shards/job-000000.json").read_text())["samples"]
    assert len(samples) == 3
    across = madgen("regenerate", "out", samples[1]["key"], "-o", "across.png")
    assert "the same pixels" in across.out or "differs by at most 1 of 255" in across.out, across.err
    result = madgen("regenerate", "out", samples[0]["key"], "-o", "again.png")
    with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
        stored = np.asarray(Image.open(tar.extractfile(f"{samples[0]['key']}.png"))).astype(int)
        recorded = json.load(tar.extractfile(f"{samples[0]['key']}.json"))["regions"]
    assert [region["prompt"] for region in recorded] == ["the sea", "dunes"]
    assert abs(stored - np.asarray(Image.open(tmp_path / "again.png"))).max() <= 1, result.out  # another batch size
    changed = madgen("generate", *job, "method.regions.bootstrapping=1")
    assert (changed.code, "mask file mask.png exists neither" in changed.err) == (2, True)


def test_unknown_key_and_other_weights_are_refused(madgen, job_file, tmp_path, tiny):
    import shutil

    folder = tmp_path / "backbone"
    shutil.copytree(tiny, folder)
    assert madgen("generate", job_file, "prompts.limit=1", f"backbone.pretrained={folder}").code == 0
    result = madgen("regenerate", "out", "nothing-0000", "-o", "again.png")
    assert (result.code, "no finished sample 'nothing-0000'" in result.err) == (2, True)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    key = json.loads((tmp_path / "out/shards/job-000000.json").read_text())["samples"][0]["key"]
    result = madgen("regenerate", "out", key, "-o", "again.png")
    assert (result.code, "are not those of the sample" in result.err) == (2, True)
    assert not (tmp_path / "again.png").exists()
