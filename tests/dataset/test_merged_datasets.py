"""`madgen merge`: the merged dataset, duplicates, prefixes, and errors."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
from pyarrow import parquet
from without_model import prompts_of, write

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.filtering.filter import write_filtered
from madgen.dataset.filtering.selection import Choice, parse
from madgen.dataset.filtering.split import split_dataset
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.merge import merge
from madgen.dataset.reader import read_sample
from madgen.dataset.records import read_file
from madgen.dataset.remote.push import push
from madgen.dataset.verify import verify
from madgen.hub.license import licences
from madgen.monitoring.status import status
from madgen.utils.errors import UserError

TEXTS = [f"fjord {number}" for number in range(12)]


@pytest.fixture
def one(tmp_path):
    return write(tmp_path / "one", prompts_of(TEXTS[:5]), "prompts.samples_per_prompt=2")


@pytest.fixture
def two(tmp_path):
    """Other prompts in shards of another size."""
    return write(tmp_path / "two", prompts_of(TEXTS[5:]), "output.samples_per_shard=4", "name=two")


def merged(tmp_path, *directories, **options):
    merge([directory.root for directory in directories], tmp_path / "merged", **options)
    return DatasetDir(tmp_path / "merged")


def keys(directory):
    return [entry.key for entry in directory.entries()]


def checked(directory, cache):
    """Return the keys of a dataset that `verify`, `status`, `push` and `load_dataset` find whole."""
    verdict = verify(directory)
    assert verdict.complete, verdict.problems
    state = status(directory)
    assert (state["complete"], state["done"] + state["quarantined"]) == (True, state["planned"])
    assert push(directory, (cache / "remote").as_uri()).complete
    loaded = datasets.load_dataset(str(directory.root), split="train", cache_dir=str(cache))
    assert sorted(loaded["__key__"]) == sorted(keys(directory))
    assert len(set(loaded["__key__"])) == len(loaded)
    return keys(directory)


def pixels(directory, key):
    return read_sample(directory, key).image_HWC


def test_merged_dataset_is_whole(one, two, tmp_path):
    both = merged(tmp_path, one, two)
    assert checked(both, tmp_path / "cache") == [*keys(one), *keys(two)]
    names = [f"made-{index:06d}" for index in range(6)]
    assert sorted(both.done()) == names
    old = [*map(one.tar, sorted(one.done())), *map(two.tar, sorted(two.done()))]
    assert all(os.path.samefile(path, both.tar(name)) for path, name in zip(old, names, strict=True))
    card = read_file(both.root / "README.md").decode()
    assert "17 of 17 synthetic panoramas" in card
    assert f"| two | 7 | `{two.read_manifest().fingerprint}` |" in card


def test_copied_shards_are_not_part_of_a_dataset(one, two, tmp_path, caplog):
    """Only `merge` joins datasets: all readers leave out what `verify` calls unplanned."""
    expected = keys(one)
    for path in two.shards.iterdir():
        shutil.copy(path, one.shards)
    assert keys(one) == expected
    index = write_index(one)
    assert "left out 2 of the shards, which are not planned, such as two-000000; madgen verify" in caplog.text
    assert parquet.read_table(index).column("key").to_pylist() == expected
    assert "10 of 10 synthetic panoramas" in read_file(one.root / "README.md").decode()
    assert "two-000001: a shard that was not planned" in verify(one).problems


def test_copies_are_files_of_their_own(one, two, tmp_path):
    both = merged(tmp_path, one, two, copy=True)
    assert both.tar("made-000000").read_bytes() == one.tar("made-000000").read_bytes()
    assert not os.path.samefile(both.tar("made-000000"), one.tar("made-000000"))
    shutil.rmtree(one.root)
    assert verify(both).complete


def test_order_of_the_datasets_is_that_of_the_shards(one, two, tmp_path):
    assert keys(merged(tmp_path, two, one)) == [*keys(two), *keys(one)]


def test_samples_of_both_datasets_are_kept_once(one, tmp_path):
    """Two datasets of one job, one with more prompts: their pixels are equal, their fingerprints are not."""
    more = write(tmp_path / "more", prompts_of(TEXTS[3:7]), "prompts.samples_per_prompt=2")
    both = merged(tmp_path, one, more)
    assert sorted(checked(both, tmp_path / "cache")) == sorted({*keys(one), *keys(more)})
    shutil.rmtree(both.root)
    assert sorted(checked(merged(tmp_path, more, one), tmp_path / "again")) == sorted({*keys(one), *keys(more)})


def test_halves_of_a_job_from_two_clusters_are_merged(tmp_path, caplog):
    job = (prompts_of(TEXTS), "prompts.samples_per_prompt=2")
    one = write(tmp_path / "one", *job, shards=range(5))
    two = write(tmp_path / "two", *job, shards=range(4, 8))
    whole = write(tmp_path / "whole", *job)
    both = merged(tmp_path, one, two)
    assert sorted(checked(both, tmp_path / "cache")) == sorted(keys(whole))
    assert "has 15 of 24 samples now; the others were left out" in caplog.text
    assert "3 samples of" in caplog.text


def test_other_pixels_of_a_key_are_refused(one, tmp_path):
    other = write(tmp_path / "other", prompts_of(TEXTS[4:6]), weights="v")
    with pytest.raises(
        UserError, match=r"have different settings \(backbone.weights: w there, v here\); --mixed merges"
    ):
        merged(tmp_path, one, other)
    with pytest.raises(UserError, match="have different pictures or prompts of fjord_4-0000; keep their keys apart"):
        merged(tmp_path, one, other, mixed=True)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prefixes", [("b-",), ("a-", "b-"), ("a-", "")])
def test_prefixes_keep_equal_keys_apart(tmp_path, prefixes, image_format):
    options = ("prompts.samples_per_prompt=2", f"output.format={image_format}")
    one = write(tmp_path / "one", prompts_of(TEXTS[:3]), *options)
    other = write(tmp_path / "other", prompts_of(TEXTS[2:5]), *options, weights="v")
    both = merged(tmp_path, one, other, mixed=True, prefixes=prefixes)
    first, second = prefixes if len(prefixes) == 2 else ("", *prefixes)
    expected = {f"{first}{key}": (one, key) for key in keys(one)} | {
        f"{second}{key}": (other, key) for key in keys(other)
    }
    assert checked(both, tmp_path / "cache") == list(expected)
    for key, (source, old) in expected.items():
        sample = read_sample(both, key)
        assert sample.metadata == {**read_sample(source, old).metadata, "key": key}
        assert np.array_equal(sample.image_HWC, pixels(source, old))
    prompts = {entry.key: both.read_manifest().prompt_id(entry.key) for entry in both.entries()}
    assert set(prompts.values()) == {f"fjord_{number}" for number in range(5)}


def test_bytes_with_a_prefix_are_those_of_a_job_with_it(tmp_path):
    """`--prefix` and `output.key_prefix` differ in the fingerprint alone, as the seeds do not depend on either."""
    plain = write(tmp_path / "plain", prompts_of(TEXTS[:3]))
    other = write(tmp_path / "other", prompts_of(TEXTS[5:7]))
    prefixed = write(tmp_path / "prefixed", prompts_of(TEXTS[:3]), "output.key_prefix=b-")
    both = merged(tmp_path, other, plain, prefixes=("b-",))
    for key in keys(prefixed):
        one, two = read_sample(both, key), read_sample(prefixed, key)
        assert {**one.metadata, "fingerprint": ""} == {**two.metadata, "fingerprint": ""}
        assert np.array_equal(one.image_HWC, two.image_HWC)


def test_grown_filtered_split_and_merged_datasets_are_merged(one, two, tmp_path):
    write(one.root, prompts_of(TEXTS[:7]), "prompts.samples_per_prompt=3")
    parts = tmp_path / "parts"
    split_dataset(two, {"a": 0.5, "b": 0.5}, "prompt", parts)
    nested = merged(tmp_path, one, DatasetDir(parts / "a"))
    assert verify(nested).complete
    write_filtered(DatasetDir(parts / "b"), Choice(parse("sample_index == 0")), tmp_path / "filtered")
    merge([nested.root, tmp_path / "filtered"], tmp_path / "all")
    last = DatasetDir(tmp_path / "all")
    assert sorted(checked(last, tmp_path / "cache")) == sorted({*keys(one), *keys(two)})
    assert len(last.read_manifest().sources) == 3
    write_filtered(last, Choice(parse("prompt contains 'fjord 1'")), tmp_path / "chosen")
    assert sorted({key[:8].rstrip("-") for key in keys(DatasetDir(tmp_path / "chosen"))}) == [
        "fjord_1",
        "fjord_10",
        "fjord_11",
    ]
    assert verify(DatasetDir(tmp_path / "chosen")).complete


def test_selection_of_mixed_datasets_is_verified_with_their_settings(one, tmp_path):
    other = write(tmp_path / "other", prompts_of(TEXTS[:5]), "sampling.guidance_scale=3", weights="v")
    both = merged(tmp_path, one, other, mixed=True, prefixes=("b-",))
    split_dataset(both, {"a": 0.5, "b": 0.5}, "prompt", tmp_path / "parts")
    sides = []
    for name in ("a", "b"):
        part = DatasetDir(tmp_path / "parts" / name)
        verdict = verify(part)
        assert verdict.complete, verdict.problems
        sides.append({part.read_manifest().prompt_id(key) for key in keys(part)})
    assert not sides[0] & sides[1], "a prompt is in both parts"


def test_quarantined_samples_stay_quarantined_or_are_replaced(tmp_path):
    options = "prompts.samples_per_prompt=2"
    one = write(tmp_path / "one", prompts_of(TEXTS[:3]), options, quarantined=["fjord_1-0000", "fjord_2-0001"])
    two = write(tmp_path / "two", prompts_of(TEXTS[5:8]), options, quarantined=["fjord_5-0001"])
    both = merged(tmp_path, one, two, prefixes=("b-",))
    verdict = verify(both)
    assert (verdict.complete, verdict.present, verdict.quarantined) == (True, 9, 3)
    assert "b-fjord_5-0001" in read_file(both.root / "quarantine.jsonl").decode()
    whole = write(tmp_path / "whole", prompts_of(TEXTS[:3]), options)
    shutil.rmtree(both.root)
    again = verify(merged(tmp_path, one, whole))
    assert (again.complete, again.present, again.quarantined) == (True, 6, 0)


def test_merging_again_gives_the_same_files(one, two, tmp_path):
    files = []
    for _ in range(2):
        both = merged(tmp_path, one, two, prefixes=("b-",))
        files.append(
            {path.relative_to(both.root): path.read_bytes() for path in both.root.rglob("*") if path.is_file()}
        )
        shutil.rmtree(both.root)
    assert files[0] == files[1]


def test_merged_dataset_is_not_generated_further(one, two, tmp_path, madgen_here):
    both = merged(tmp_path, one, two)
    with pytest.raises(UserError, match="holds what madgen merge wrote; choose another"):
        manifest.check_directory(both, one.read_manifest(), "extend")
    both.tar("made-000001").unlink()
    result = madgen_here("verify", "merged", "--repair")
    assert (result.code, "was not generated: remove it, then madgen merge again" in result.err) == (2, True)


@pytest.mark.parametrize("place", ["job", "identity", "generations", "plan", "fingerprint"])
def test_changes_of_the_sources_in_dataset_json_are_found(one, two, tmp_path, place):
    write(one.root, prompts_of(TEXTS[:5]), "prompts.samples_per_prompt=3")
    both = merged(tmp_path, one, two)
    content = json.loads(read_file(both.manifest))
    source = content["sources"][0]
    {
        "job": lambda: source["job"].update(name="other"),
        "identity": lambda: source["identity"]["sampling"].update(guidance_scale=99),
        "generations": lambda: source["generations"][0].update(samples=9),
        "plan": lambda: source["plan"].update(samples=9),
        "fingerprint": lambda: source.update(fingerprint="0" * 32),
    }[place]()
    both.manifest.write_text(json.dumps(content), encoding="utf-8")
    assert verify(both).problems


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "name at least two datasets to merge"),
        (["one", "one/"], "is named twice; merge each dataset once"),
        (["one", "missing"], "missing holds no madgen dataset (no dataset.json)"),
        (["one", "two", "--prefix", "a,b,c"], "--prefix has 3 prefixes for 2 datasets; give one for each"),
        (["one", "two", "--prefix", "a/"], "--prefix: 'a/' must be at most 32 of [A-Za-z0-9_-]"),
        (["one", "jpg", "--mixed"], "have different image formats (png, jpg)"),
        (["one", "two", "-o", "two"], "-o two is not empty; choose another directory"),
    ],
)
def test_wrong_arguments_are_refused(one, two, madgen_here, tmp_path, arguments, message):
    if "jpg" in arguments:
        write(tmp_path / "jpg", prompts_of(TEXTS[5:]), "output.format=jpg")
    result = madgen_here("merge", *arguments, *([] if "-o" in arguments else ["-o", "new"]))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [9000, 0])
def test_cut_tar_is_refused_and_nothing_is_written(one, two, tmp_path, size):
    tar = one.tar(one.read_manifest().shard_names()[0])
    os.truncate(tar, size)
    with pytest.raises(UserError, match=f"has {size} bytes, expected .*; run madgen verify {one.root}"):
        merged(tmp_path, one, two)
    assert not (tmp_path / "merged").exists()


def test_merge_from_the_command_line(one, two, madgen_here, tmp_path):
    result = madgen_here("merge", "one", "two", "-o", "new")
    assert (result.code, result.out) == (0, "new: 17 samples of 2 datasets\n"), result.err
    assert madgen_here("verify", "new").code == 0


def test_rows_of_the_index_have_the_licence_of_their_source(one, tmp_path):
    other = write(tmp_path / "other", prompts_of(TEXTS[5:]), "name=other")
    content = json.loads(read_file(other.manifest))
    content["licence"] = licences(load_job([], ["backbone.pretrained=Qwen/Qwen-Image-2.1"]).backbone)
    other.manifest.write_text(json.dumps(content), encoding="utf-8")
    both = merged(tmp_path, one, other, mixed=True)
    rows = parquet.read_table(both.root / "index.parquet").to_pylist()
    terms = [(row["weights_licence"], row["commercial_use"]) for row in rows]
    assert terms == [("apache-2.0", "yes")] * 10 + [("qwen-research", "no")] * 7
    assert verify(both).complete
