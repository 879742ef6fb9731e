"""`madgen split`: parts, their stability, and errors."""

import json
import math
from collections import Counter

import datasets
import pytest
from without_model import prompts_of, write

from madgen.dataset.filtering.split import part_of, split_dataset
from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import read_file
from madgen.dataset.verify import verify

TEXTS = [f"fjord {number}" for number in range(24)]
SHARES = {"train": 0.7, "val": 0.3}


def split(source, target, shares=SHARES, by="prompt"):
    split_dataset(source, shares, by, target)
    return {name: DatasetDir(target / name) for name in shares}


def keys(directory):
    return [entry.key for entry in directory.entries()]


def members(directory):
    """Return the checksum of each sample's records by its key."""
    return {entry.key: entry.sha256 for entry in directory.entries()}


@pytest.mark.parametrize("by", ["prompt", "sample"])
def test_parts_are_whole_datasets(tmp_path, by):
    source = write(tmp_path / "out", prompts_of(TEXTS), "prompts.samples_per_prompt=2")
    parts = split(source, tmp_path / "parts", by=by)
    both = [key for part in parts.values() for key in keys(part)]
    assert sorted(both) == sorted(keys(source))
    assert {**members(parts["train"]), **members(parts["val"])} == members(source)
    for name, part in parts.items():
        verdict = verify(part)
        assert verdict.complete, verdict.problems
        loaded = datasets.load_dataset(str(part.root), split="train", cache_dir=str(tmp_path / f"cache-{name}"))
        assert loaded["__key__"] == keys(part)
    prompts = [{key.rpartition("-")[0] for key in keys(part)} for part in parts.values()]
    assert bool(prompts[0] & prompts[1]) == (by == "sample")


def test_growing_keeps_the_split(tmp_path):
    source = write(tmp_path / "out", prompts_of(TEXTS[5:20]))
    before = {name: members(part) for name, part in split(source, tmp_path / "before").items()}
    write(tmp_path / "out", prompts_of(TEXTS), "prompts.samples_per_prompt=2")
    after = {name: members(part) for name, part in split(source, tmp_path / "after").items()}
    for name in SHARES:
        assert before[name].items() <= after[name].items()
        assert len(before[name]) < len(after[name])
        assert verify(DatasetDir(tmp_path / "after" / name)).complete


def test_split_depends_on_ids_alone(tmp_path):
    source = write(tmp_path / "out", prompts_of(TEXTS))
    other = write(
        tmp_path / "other", prompts_of(reversed(TEXTS)), "output.key_prefix=b-", "prompts.seed=3", weights="v"
    )
    for name, part in split(source, tmp_path / "one").items():
        same = DatasetDir(split(other, tmp_path / f"two-{name}")[name].root)
        assert sorted(keys(same)) == sorted(f"b-{key}" for key in keys(part))


def test_shares_are_those_of_a_uniform_hash():
    """The counts lie within five standard deviations of a binomial distribution."""
    shares, samples = {"train": 0.8, "val": 0.15, "test": 0.05}, 20_000
    counts = Counter(part_of(f"prompt-{number}", shares) for number in range(samples))
    for name, share in shares.items():
        assert abs(counts[name] - share * samples) < 5 * math.sqrt(samples * share * (1 - share))


def test_same_split_gives_the_same_bytes(tmp_path):
    source = write(tmp_path / "out", prompts_of(TEXTS))
    one, two = split(source, tmp_path / "one"), split(source, tmp_path / "two")
    for name in SHARES:
        files = [path.relative_to(one[name].root) for path in one[name].root.rglob("*") if path.is_file()]
        assert {file: (one[name].root / file).read_bytes() for file in files} == {
            file: (two[name].root / file).read_bytes() for file in files
        }


def test_parts_say_where_they_come_from(tmp_path):
    source = write(tmp_path / "out", prompts_of(TEXTS))
    part = split(source, tmp_path / "parts")["val"]
    content = json.loads(read_file(part.manifest))["filtered"]
    assert content["split"] == {"shares": [["train", 0.7], ["val", 0.3]], "by": "prompt", "part": "val"}
    assert content["from"]["fingerprint"] == source.read_manifest().fingerprint
    assert "madgen split --shares train=0.7,val=0.3 --by prompt" in read_file(part.root / "README.md").decode()


def test_empty_part_is_a_dataset_too(tmp_path, caplog):
    source = write(tmp_path / "out", prompts_of(TEXTS[:2]))
    parts = split(source, tmp_path / "parts", {"all": 1 - 1e-7, "none": 1e-7})
    assert keys(parts["none"]) == []
    assert verify(parts["none"]).complete
    assert "is empty: no prompt has a hash in its share of 1e-07" in caplog.text


def test_parts_of_an_unfinished_dataset_have_its_finished_samples(tmp_path, caplog):
    source = write(tmp_path / "out", prompts_of(TEXTS), shards=[1, 2])
    parts = split(source, tmp_path / "parts")
    assert sum(len(keys(part)) for part in parts.values()) == 6
    assert "has 6 of 24 samples now; the others were left out" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares", "train"], "--shares: 'train' is not NAME=SHARE"),
        (["--shares", "train=0.9,val=x"], "val='x' is not a number"),
        (["--shares", "train=0.9,val=0.2"], "--shares=train=0.9,val=0.2 add up to 1.1, and must add up to 1"),
        (["--shares", "train=1.5,val=-0.5"], "train=1.5 must be > 0 and <= 1"),
        (["--shares", "train=nan,val=0.5"], "train=nan must be > 0 and <= 1"),
        (["--shares", "a=0.5,a=0.5"], "names 'a' twice"),
        (["--shares", "../a=0.5,b=0.5"], "'../a=0.5' is not NAME=SHARE"),
        (["--shares", "a=0.5,,b=0.5"], "'' is not NAME=SHARE"),
        (["--shares", "a=0.5,b=0.5", "--by", "shard"], "--by must be one of prompt, sample, got 'shard'"),
        (["--shares", "a=0.5,b=0.5", "-o", "."], "is not empty; choose another directory"),
    ],
)
def test_wrong_arguments_are_refused(madgen_here, tmp_path, arguments, message):
    write(tmp_path / "out", prompts_of(TEXTS[:3]))
    arguments = arguments if "-o" in arguments else [*arguments, "-o", "parts"]
    result = madgen_here("split", "out", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert not (tmp_path / "parts").exists()


def test_failed_split_leaves_nothing(tmp_path, madgen_here):
    source = write(tmp_path / "out", prompts_of(TEXTS))
    tar = source.tar("made-000004")
    tar.write_bytes(bytes(len(tar.read_bytes())))
    assert madgen_here("split", "out", "--shares", "a=0.5,b=0.5", "-o", "parts").code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
