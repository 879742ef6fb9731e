"""`madgen filter`: selection, files, and errors."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from plans import table_of, tasks_of

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.filtering import filter as filtering
from madgen.dataset.filtering.filter import write_filtered, write_keys
from madgen.dataset.filtering.selection import Choice, choose, parse
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.shards.recovery import repair
from madgen.dataset.shards.writer import OpenShard
from madgen.dataset.verify import exit_code, verify
from madgen.monitoring.status import status
from madgen.types import Prompt, Record
from madgen.utils.errors import UserError

TEXTS = ["Snow on hills", "fog over a lake", "dunes | `at` night", "snow and fog"]
PLAN = Plan("job", table_of((Prompt(f"p{i}", text, "", 16, 32) for i, text in enumerate(TEXTS)), 3), 3, 5, 0)
KEYS = [task.key for task in tasks_of(PLAN)[:12]]
COHERENCE = [0.5, 0.9, 0.7, 0.8, 0.8, 0.6, 0.95, 0.2, 0.3, None, 0.4, 0.4]
SEAM = [1.0, 1.5, 1.1, 1.3, 1.2, 1.4, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0]


def scores_of(position):
    found = {"seam": SEAM[position], "coherence": COHERENCE[position]}
    return {name: value for name, value in found.items() if value is not None}


def make(root, scores=scores_of, quarantined=(), shards=range(3)):
    directory = DatasetDir(root)
    job = load_job([], ["name=job"])
    manifest.create(directory, manifest.manifest(job, PLAN, job_identity(job, PLAN, "float32", WeightIds("w"))))
    for index in shards:
        shard = OpenShard(directory, PLAN.shard(index), "w")
        for position, task in enumerate(PLAN.shard(index).tasks):
            if task.key in quarantined:
                shard.quarantine(position, "constant", "nothing to see")
                continue
            found = scores(index * 5 + position)
            image = np.random.default_rng(task.seed).integers(0, 255, (16, 32, 3), dtype=np.uint8)
            about = {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 16, "width": 32}
            data = encode_sample(Record(task, image, {**about, **({"scores": found} if found else {})}), "png", 95)
            shard.add(position, data, found or None)
        shard.publish()
    return directory


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "out")


def kept(directory):
    return [entry.key for entry in directory.entries()]


def samples(directory):
    """Every sample's bytes by its key, read with tarfile alone."""
    found = {}
    for path in sorted(directory.shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def hashes(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("where", "best", "by", "expected"),
    [
        ("coherence > 0.8", None, None, [1, 6]),
        ("coherence >= 0.8 and seam < 1.3", None, None, [4, 6]),
        ("not coherence > 0.3", None, None, [7, 8]),
        ("prompt contains 'snow'", None, None, [0, 1, 2, 9, 10, 11]),
        (None, 1, "coherence", [1, 3, 6, 10]),  # of p1's two at 0.8 the first key, of p3's the first that has a score
        (None, 2, "coherence", [1, 2, 3, 4, 6, 8, 10, 11]),
        (None, 1, "seam", [0, 4, 6, 9]),
        (None, 9, "seam", list(range(12))),
        ("prompt contains 'fog'", 1, "coherence", [3, 10]),
        ("coherence < 0.8", 1, "coherence", [2, 5, 8, 10]),
        (f"seed == {tasks_of(PLAN)[7].seed}", None, None, [7]),
        ("height == 16 and width == 32", None, None, list(range(12))),
    ],
)
def test_filter_keeps_the_selected_samples(source, tmp_path, where, best, by, expected):
    """In the order of the dataset, also across its shards; the result is a whole dataset."""
    choice = Choice(where and parse(where), best, by)
    count, seen = write_filtered(source, choice, tmp_path / "new")
    new = DatasetDir(tmp_path / "new")
    assert kept(new) == [KEYS[position] for position in expected]
    assert (count, seen.samples) == (len(expected), 12)
    verdict = verify(new)
    assert (verdict.problems, verdict.present, exit_code(verdict)) == ([], len(expected), 0)
    before = samples(source)
    assert samples(new) == {name: data for name, data in before.items() if name.partition(".")[0] in kept(new)}
    assert write_keys(source, choice, tmp_path / "keys.txt")[0] == len(expected)
    assert (tmp_path / "keys.txt").read_text(encoding="utf-8").split() == kept(new)


def test_filtered_dataset_verifies_and_previews(source, tmp_path):
    from pyarrow import parquet

    write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "new")
    new = DatasetDir(tmp_path / "new")
    names = ["README.md", "dataset.json", "index.parquet", "samples", "shards"]
    assert sorted(path.name for path in new.root.iterdir()) == names
    assert sorted(path.name for path in new.shards.iterdir()) == [
        f"job-{index:06d}.{suffix}" for index in range(2) for suffix in ("json", "tar")
    ]
    rows = parquet.read_table(new.root / "index.parquet").to_pylist()
    assert [row["key"] for row in rows] == kept(new)
    by_key = {row["key"]: row for row in rows}
    assert (by_key[KEYS[2]]["coherence"], by_key[KEYS[2]]["seam"], by_key[KEYS[2]]["wrap"]) == (0.7, 1.1, None)
    assert by_key[KEYS[9]]["coherence"] is None
    state = status(new)
    assert (state["complete"], state["planned"], state["done"], state["workers"]) == (True, 9, 9, [])
    assert [len(sidecar.samples) for sidecar in new.sidecars()] == [5, 4]


def test_filtered_dataset_records_its_source(source, tmp_path):
    where = "not prompt contains '`at`'"
    write_filtered(source, Choice(parse(where), 1, "coherence"), tmp_path / "new")
    content = DatasetDir(tmp_path / "new").read_manifest()
    old = source.read_manifest()
    digest = hashlib.sha256("".join(f"{key}\n" for key in KEYS).encode()).hexdigest()
    origin = {"name": "job", "fingerprint": old.fingerprint, "samples": 12, "keys_sha256": digest, "filtered": None}
    assert content.filtered == {"from": origin, "where": where, "best": 1, "by": "coherence"}
    assert content.plan.prompts == content.plan.samples == 3
    assert content.job == old.job
    assert content.fingerprint not in (old.fingerprint, "")
    card = (tmp_path / "new/README.md").read_text(encoding="utf-8")
    assert f'    madgen filter --where "{where}" --best 1 --by coherence\n' in card
    assert "3 of 3 synthetic panoramas" in card
    write_filtered(DatasetDir(tmp_path / "new"), Choice(parse("coherence > 0.85")), tmp_path / "newer")
    again = DatasetDir(tmp_path / "newer").read_manifest().filtered
    assert again["from"]["filtered"] == content.filtered
    assert verify(DatasetDir(tmp_path / "newer")).complete


def test_equal_selection_gives_equal_bytes(source, tmp_path):
    """Of every file, also from a copy of the source that other workers made at another time."""
    for name in ("one", "two"):
        write_filtered(source, Choice(parse("seam < 1.4"), 2, "coherence"), tmp_path / name)
    again = make(tmp_path / "again")
    assert hashes(again.root) != hashes(source.root), "sidecars say when they were made"
    write_filtered(again, Choice(parse("seam < 1.4"), 2, "coherence"), tmp_path / "three")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "three")
    write_index(DatasetDir(tmp_path / "two"))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_webdataset_and_hugging_face_read_it(source, tmp_path):
    import datasets
    import webdataset

    write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "new")
    files = sorted(str(path) for path in (tmp_path / "new/shards").glob("*.tar"))
    read = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == kept(DatasetDir(tmp_path / "new"))
    assert json.loads(read[0]["json"])["scores"] == scores_of(0)
    loaded = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == len(read)
    assert loaded[1]["json"]["scores"]["seam"] == SEAM[2]


def test_selection_opens_no_tar(source, tmp_path):
    for path in source.shards.glob("*.tar"):
        path.write_bytes(b"nothing")
    assert write_keys(source, Choice(None, 1, "coherence"), tmp_path / "keys")[0] == 4


def test_quarantined_and_missing_samples_are_left_out(tmp_path):
    source = make(tmp_path / "out", quarantined={KEYS[1]}, shards=(0, 2))
    count, seen = write_filtered(source, Choice(parse("coherence > 0.4")), tmp_path / "new")
    assert (count, seen.samples) == (4, 6)
    assert kept(DatasetDir(tmp_path / "new")) == [KEYS[position] for position in (0, 2, 3, 4)]
    assert verify(DatasetDir(tmp_path / "new")).complete


@pytest.mark.parametrize("kind", ["a sample less", "another sample", "other scores", "flip"])
def test_verify_finds_damage_in_what_was_filtered(source, tmp_path, kind):
    write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "new")
    new = DatasetDir(tmp_path / "new")
    name = "job-000001"
    content = json.loads(new.sidecar(name).read_text(encoding="utf-8"))
    if kind == "a sample less":
        new.tar(name).unlink()
        new.sidecar(name).unlink()
        write_filtered(source, Choice(parse("seam < 1.3")), tmp_path / "other")
        for path in (tmp_path / "other/shards").glob(f"{name}.*"):
            path.rename(new.shards / path.name)
    elif kind == "another sample":
        write_filtered(source, Choice(parse("seam < 1.3 or seam == 1.4")), tmp_path / "other")
        for path in (tmp_path / "other/shards").glob("*"):
            path.rename(new.shards / path.name)
    elif kind == "other scores":
        content["samples"][0]["scores"]["seam"] = 0.5
        new.sidecar(name).write_text(json.dumps(content), encoding="utf-8")
    else:
        data = bytearray(new.tar(name).read_bytes())
        data[600] ^= 1
        new.tar(name).write_bytes(data)
    verdict = verify(new)
    assert verdict.problems
    assert (exit_code(verdict), verdict.fix) == (1, "remove it, then madgen filter again")
    if kind == "other scores":
        assert "its scores are not those of its sidecar" in verdict.problems[0]
    before = hashes(new.root)
    with pytest.raises(UserError, match="was not generated: remove it, then madgen filter again"):
        repair(new, verdict)
    assert hashes(new.root) == before


@pytest.mark.parametrize("cut", [False, True])
def test_damage_of_the_source_is_not_copied(source, tmp_path, cut):
    data = bytearray(source.tar("job-000001").read_bytes())
    entry = json.loads(source.sidecar("job-000001").read_text(encoding="utf-8"))["samples"][1]
    data[entry["offset"] + 700] ^= 1
    source.tar("job-000001").write_bytes(data[: entry["offset"] + 700] if cut else data)
    with pytest.raises(UserError, match=f"checksum mismatch of sample {KEYS[6]} .*; run madgen verify"):
        write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_filter_leaves_no_files(source, tmp_path, monkeypatch):
    """The disk is full when the last file is written."""

    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filtering, "write_index", full)
    with pytest.raises(OSError, match="No space"):
        write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_target_is_refused(source, tmp_path):
    (tmp_path / "empty").mkdir()
    write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "empty")
    assert verify(DatasetDir(tmp_path / "empty")).complete
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "link")
    assert hashes(tmp_path / "place") == hashes(tmp_path / "empty")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    before = hashes(tmp_path)
    for target, message in (
        ("empty", "is not empty"),
        ("out", "is not empty"),
        ("file", "is a file"),
        ("no/new", "the folder .*no does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / target)
    for path, message in (("file", "exists already"), ("no/keys", "the folder .*no does not exist")):
        with pytest.raises(UserError, match=message):
            write_keys(source, Choice(parse("seam < 1.4")), tmp_path / path)
    assert hashes(tmp_path) == before


def test_generate_refuses_a_filtered_dataset(source, tmp_path):
    write_filtered(source, Choice(parse("seam < 1.4")), tmp_path / "new")
    new = DatasetDir(tmp_path / "new")
    with pytest.raises(UserError, match="holds what madgen filter chose of a dataset; choose another"):
        manifest.check_directory(new, source.read_manifest(), "if_same")


@pytest.mark.parametrize(
    ("where", "best", "by", "message"),
    [
        (None, None, None, "nothing to select by"),
        (None, 1, None, "--best and --by go together"),
        ("seam < 1", None, "seam", "--best and --by go together"),
        (None, 0, "seam", "--best must be >= 1 sample of each prompt, got 0"),
        (None, 1, "seem", "--by: unknown score 'seem'; did you mean 'seam'?"),
        (None, 1, "prompt", "--by: unknown score 'prompt'"),
        ("coherence > 0.99", None, None, "no sample of .* matches, out of 12; coherence is 0.2 to 0.95"),
        ("prompt contains 'sea'", None, None, "no sample of .* matches, out of 12; relax the selection"),
        ("wrap < 2", None, None, "has the score 'wrap', only seam, coherence; wrap is recorded for loops"),
        (None, 1, "clip", "has the score 'clip', only .*; clip needs scores.clip=MODEL"),
    ],
)
def test_invalid_selections_are_refused(source, where, best, by, message):
    with pytest.raises(UserError, match=message) as error:
        choose(source, Choice(where and parse(where), best, by))
    assert "\n" not in str(error.value)


def test_missing_scores_error_names_the_fix(tmp_path):
    source = make(tmp_path / "out", scores=lambda position: {})
    with pytest.raises(UserError, match="has no scores; generate records them unless"):
        choose(source, Choice(parse("coherence > 0.8")))
    assert write_filtered(source, Choice(parse("prompt contains 'fog'")), tmp_path / "new")[0] == 6
    assert verify(DatasetDir(tmp_path / "new")).complete


@pytest.mark.parametrize("scores", [[1], {"seam": "low"}, {"seam": True}])
def test_damaged_scores_are_named(source, scores):
    content = json.loads(source.sidecar("job-000001").read_text(encoding="utf-8"))
    content["samples"][0]["scores"] = scores
    source.sidecar("job-000001").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"job-000001.json is damaged: samples\[0\].scores.* is .*; run madgen verify"):
        choose(source, Choice(parse("seam > 0")))


def test_keys_are_printed_to_standard_output(source, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filtering.filter_dataset(source, Choice(parse("coherence > 0.85")), None, Path("-"))
    printed = capsys.readouterr()
    assert printed.out.split() == [KEYS[1], KEYS[6]]
    assert printed.err == "-: 2 of 12 samples\n"
    assert not (tmp_path / "-").exists()
