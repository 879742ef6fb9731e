import json
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_a_sample_is_made_again_from_its_json(madgen, job_file, tmp_path, image_format):
    assert madgen("generate", job_file, "prompts.limit=1", f"output.format={image_format}").code == 0
    key = json.loads((tmp_path / "out/shards/job-000000.json").read_text())["samples"][1]["key"]
    result = madgen("regenerate", "out", key, "-o", "again.png")
    assert (result.code, "the same pixels" in result.out) == (0, True), result.err
    if image_format == "png":
        with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
            stored = np.asarray(Image.open(tar.extractfile(f"{key}.png")))
        assert np.array_equal(stored, np.asarray(Image.open(tmp_path / "again.png")))


def test_it_refuses_an_unknown_key_and_other_weights(madgen, job_file, tmp_path, tiny):
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
    assert (result.code, "holds other weights" in result.err) == (2, True)
    assert not (tmp_path / "again.png").exists()
