import json
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_sample_is_regenerated_from_its_json(madgen, job_file, tmp_path, image_format):
    assert madgen("generate", job_file, "prompts.limit=1", f"output.format={image_format}").code == 0
    key = json.loads((tmp_path / "out/shards/job-000000.json").read_text(encoding="utf-8"))["samples"][1]["key"]
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
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    job = (job_file, "prompts.source=prompts.jsonl", "prompts.samples_per_prompt=1", "sampling.loop=true")
    made = madgen("generate", *job, "method.regions.bootstrapping=1", "sampling.batch_size=3")
    assert made.code == 0, made.err
    (tmp_path / "mask.png").unlink()
    samples = json.loads((tmp_path / "out/shards/job-000000.json").read_text(encoding="utf-8"))["samples"]
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
    assert (changed.code, "mask file mask.png does not exist" in changed.err) == (2, True)


def test_unknown_key_and_other_weights_are_refused(madgen, job_file, tmp_path, tiny):
    import shutil

    folder = tmp_path / "backbone"
    shutil.copytree(tiny, folder)
    assert madgen("generate", job_file, "prompts.limit=1", f"backbone.pretrained={folder}").code == 0
    result = madgen("regenerate", "out", "nothing-0000", "-o", "again.png")
    assert (result.code, "no sample 'nothing-0000'" in result.err) == (2, True)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    key = json.loads((tmp_path / "out/shards/job-000000.json").read_text(encoding="utf-8"))["samples"][0]["key"]
    result = madgen("regenerate", "out", key, "-o", "again.png")
    assert (result.code, "are not those of the sample" in result.err) == (2, True)
    assert not (tmp_path / "again.png").exists()


def test_environment_is_recorded_beside_the_tar_and_last_bits_have_their_own_status(madgen, job_file, tmp_path):
    """The tar is the same whatever made it; the sidecar says what did. Changed pixels stand for other last bits."""
    import torch

    from madgen.generation.regenerate import LAST_BITS, OTHER_PICTURE, SAME, _compare

    assert madgen("generate", job_file, "prompts.limit=1", "sampling.batch_size=2").code == 0
    sidecar = json.loads((tmp_path / "out/shards/job-000000.json").read_text(encoding="utf-8"))
    environment = sidecar["environment"]
    assert (environment["device_type"], environment["batch_size"]) == ("cpu", 2)
    assert environment["threads"] >= 1
    assert environment["versions"]["torch"] == torch.__version__
    assert set(environment["versions"]) == {"madgen", "torch", "diffusers", "transformers"}
    with tarfile.open(tmp_path / "out/shards/job-000000.tar") as tar:
        metadata = [tar.extractfile(member).read() for member in tar if member.name.endswith(".json")]
    assert all(b"threads" not in content for content in metadata)

    nothing = np.zeros((4, 4, 3), int)
    last_bits, other, spread = nothing.copy(), nothing.copy(), nothing + 1
    last_bits[0, 0], other[0, 0] = 8, 9
    assert [_compare(each) for each in (nothing, last_bits, other, spread)] == [
        SAME,
        LAST_BITS,
        OTHER_PICTURE,
        OTHER_PICTURE,
    ]
    assert (SAME, LAST_BITS, OTHER_PICTURE) == (0, 5, 1)


def test_another_picture_is_told_from_last_bits_on_the_command_line(madgen, job_file, tmp_path):
    """Weights that differ are refused elsewhere; here the stored pixels are changed, with their checksums."""
    import hashlib
    import io

    assert madgen("generate", job_file, "prompts.limit=1", "prompts.samples_per_prompt=1").code == 0
    tar_path, path = tmp_path / "out/shards/job-000000.tar", tmp_path / "out/shards/job-000000.json"
    original, sidecar = tar_path.read_bytes(), json.loads(path.read_text(encoding="utf-8"))
    (entry,) = sidecar["samples"]
    for change, code, words in ((1, 5, "only the last bits: differs by at most"), (90, 1, "differs by at most")):
        output = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(original)) as source, tarfile.open(fileobj=output, mode="w") as target:
            for member in source:
                content = source.extractfile(member).read()
                if member.name.endswith(".png"):
                    pixels = np.asarray(Image.open(io.BytesIO(content))).astype(int)
                    pixels[0, :4] += np.where(pixels[0, :4] > 127, -change, change)
                    picture = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(picture, "PNG")
                    content = picture.getvalue()
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
            size = output.tell()
        data = output.getvalue()
        entry.update(offset=0, size=size, sha256=hashlib.sha256(data[:size]).hexdigest())
        tar_path.write_bytes(data)
        path.write_text(json.dumps(sidecar), encoding="utf-8")
        result = madgen("regenerate", "out", entry["key"], "-o", "again.png")
        assert (result.code, words in result.out) == (code, True), result.out + result.err
        assert "made with " in result.out
        assert "now  with " in result.out

    del sidecar["environment"]  # of an earlier version
    path.write_text(json.dumps(sidecar), encoding="utf-8")
    result = madgen("regenerate", "out", entry["key"], "-o", "again.png")
    assert (result.code, "an environment that was not recorded" in result.out) == (1, True), result.err
