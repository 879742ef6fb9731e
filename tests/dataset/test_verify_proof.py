"""What `verify` proves, and that `--repair` and `generate` restore the same bytes."""

import hashlib
import json
import os
import shutil
import tarfile

import pyarrow as pa
import pytest
from processes import begin, environment
from pyarrow import parquet
from rewriting import and_embedded, changed, rewrite

from madgen.dataset.format import Manifest
from madgen.dataset.identity import fingerprint
from madgen.dataset.layout import DatasetDir
from madgen.dataset.licences import LICENCE_COLUMNS
from madgen.dataset.shards.recovery import repair
from madgen.dataset.verify import exit_code, verify

NAMES = [f"job-{index:06d}" for index in range(4)]


@pytest.fixture(scope="module")
def made(job_file_of_module):
    """Return the folder of two datasets with the same names, keys and prompts, and of their job."""
    folder = job_file_of_module.parent
    for arguments in ((), ("output.dir=other", "sampling.guidance_scale=3.0")):
        process = begin(("generate", job_file_of_module, *arguments), folder, environment())
        assert process.wait() == 0, process.output()
    return folder


@pytest.fixture
def dataset(made, tmp_path):
    """Return a copy of the first dataset."""
    shutil.copytree(made / "out", tmp_path / "out")
    return DatasetDir(tmp_path / "out")


def tars(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.shards.glob("*.tar"))}


def test_rewriting_without_a_change_gives_the_same_tar(dataset):
    before = tars(dataset)
    for name in NAMES:
        rewrite(dataset, name, lambda *_: None)
    assert tars(dataset) == before
    assert verify(dataset).problems == []


def in_json(*path, value):
    def change(metadata, members, entry):
        for name in path[:-1]:
            metadata = metadata[name]
        metadata[path[-1]] = value

    return change


CHANGES = {
    "fingerprint": in_json("fingerprint", value="dead"),
    "guidance_scale": in_json("sampling", "guidance_scale", value=99),
    "method": in_json("method", "mad", "steps", value=2),
    "weights": in_json("backbone", "weights", value="0" * 32),
    "seed of the JSON": in_json("seed", value=7),
    "seed": changed(seed=7),
    "prompt": changed(prompt="another"),
    "height of the JSON": in_json("height", value=33),
    "scores of the JSON": in_json("scores", value={"seam": 1.0}),
    "key of the JSON": in_json("key", value="x-0000"),
    "sample_index": in_json("sample_index", value=5),
    "embedded guidance_scale": and_embedded(in_json("sampling", "guidance_scale", value=99)),
    "embedded fingerprint": and_embedded(in_json("fingerprint", value="dead")),
    "txt": lambda metadata, members, entry: members.update(txt=b"another"),
    "png": lambda metadata, members, entry: members.update(png=members["png"][:-20]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_records_that_disagree_are_found_and_generated_again(dataset, kind):
    rewrite(dataset, NAMES[1], CHANGES[kind])
    verdict = verify(dataset)
    assert exit_code(verdict) == 1
    assert list(verdict.broken) == [NAMES[1]], verdict.problems
    repaired = repair(dataset, verdict)
    assert (repaired.shards, repaired.samples) == (1, 1)


@pytest.mark.parametrize("change", [changed(seed=7), changed(prompt="another"), changed(negative_prompt="dark")])
def test_consistently_changed_prompts_and_seeds_contradict_the_plan(dataset, change):
    """JSON, image, text and sidecar agree; only the plan's digest, or the prompt's other sample, does not."""
    rewrite(dataset, NAMES[0], and_embedded(change))
    verdict = verify(dataset)
    assert exit_code(verdict) == 1
    assert set(verdict.broken) == set(NAMES)  # `generate` keeps what agrees with its plan


@pytest.mark.parametrize("field", ["offset", "size", "sha256", "prompt", "seed", "height", "scores"])
def test_sidecar_entries_belong_to_their_own_records(dataset, field):
    content = json.loads(dataset.sidecar(NAMES[0]).read_text(encoding="utf-8"))
    first, second = content["samples"][:2]
    if first[field] == second[field]:
        first[field] = {"prompt": "other", "height": 48, "size": 512}[field]
    else:
        first[field], second[field] = second[field], first[field]
    dataset.sidecar(NAMES[0]).write_text(json.dumps(content), encoding="utf-8")
    assert list(verify(dataset).broken) == [NAMES[0]]


@pytest.mark.parametrize("kind", ["cut", "junk", "padding", "inner padding", "header", "mode"])
def test_every_byte_of_a_tar_is_checked(dataset, kind):
    path, sidecar = dataset.tar(NAMES[0]), json.loads(dataset.sidecar(NAMES[0]).read_text(encoding="utf-8"))
    data, entry = bytearray(path.read_bytes()), sidecar["samples"][0]
    end = sidecar["samples"][-1]["offset"] + sidecar["samples"][-1]["size"]
    if kind == "cut":
        del data[end:]
    elif kind == "junk":
        data += bytes(100_000)
    elif kind == "padding":
        data[-1] = 65
    elif kind == "inner padding":
        data[entry["size"] - 1] = 65
    else:
        with tarfile.open(path) as tar:
            info = tar.next()
        info.uname, info.mode = ("x", info.mode) if kind == "header" else (info.uname, 0o600)
        data[:512] = info.tobuf(tarfile.PAX_FORMAT)
    entry["sha256"] = hashlib.sha256(data[: entry["size"]]).hexdigest()
    path.write_bytes(data)
    dataset.sidecar(NAMES[0]).write_text(json.dumps(sidecar), encoding="utf-8")
    assert list(verify(dataset).broken) == [NAMES[0]]


def test_swapped_shards_are_blamed_and_restored(dataset, madgen_here, made, tmp_path):
    before = tars(dataset)
    for suffix in (".tar", ".json"):
        paths = [dataset.shards / f"{name}{suffix}" for name in NAMES[:2]]
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, reversed(contents), strict=True):
            path.write_bytes(content)
    result = madgen_here("verify", "out", "--repair")
    assert result.code == 1
    assert f"{NAMES[0]}: its sidecar is that of shard '{NAMES[1]}' (index 1)" in result.out
    assert "2 shards marked for regeneration, 6 samples to generate" in result.err
    assert "; 6 generated in" in madgen_here("generate", made / "job.yaml", f"output.dir={tmp_path}/out").err
    assert tars(dataset) == before
    assert madgen_here("verify", "out").code == 0


def test_copied_shard_is_counted_and_restored(dataset):
    for suffix in (".tar", ".json"):
        shutil.copy(dataset.shards / f"{NAMES[1]}{suffix}", dataset.shards / f"{NAMES[0]}{suffix}")
    verdict = verify(dataset)
    assert list(verdict.broken) == [NAMES[0]], verdict.problems
    assert repair(dataset, verdict).samples == 3


@pytest.mark.parametrize("earlier", [False, True], ids=["", "sidecar of an earlier version"])
def test_shards_of_another_dataset_are_refused_and_repaired(dataset, madgen_here, made, tmp_path, earlier):
    before, generate = tars(dataset), ("generate", made / "job.yaml", f"output.dir={tmp_path}/out")
    for suffix in (".tar", ".json"):
        shutil.copy(made / "other/shards" / f"{NAMES[2]}{suffix}", dataset.shards)
    if earlier:
        content = json.loads(dataset.sidecar(NAMES[2]).read_text(encoding="utf-8"))
        del content["fingerprint"]
        dataset.sidecar(NAMES[2]).write_text(json.dumps(content), encoding="utf-8")
    for command in (generate, ("push", "out", (tmp_path / "there").as_uri())):
        refused = madgen_here(*command)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
        assert f"{NAMES[2]}.tar is a shard of another dataset" in refused.err
    assert not (tmp_path / "there").exists()
    result = madgen_here("verify", "out", "--repair")
    assert (result.code, "1 shard marked for regeneration, 3 samples to generate" in result.err) == (1, True)
    assert madgen_here(*generate).code == 0
    assert tars(dataset) == before


@pytest.mark.parametrize("kind", ["directory", "pipe", "sidecar"])
def test_file_that_is_no_regular_file_is_a_problem(dataset, kind):
    path = dataset.sidecar(NAMES[3]) if kind == "sidecar" else dataset.tar(NAMES[3])
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    verdict = verify(dataset)
    assert f"{path} is not a regular file" in verdict.problems[0]
    assert repair(dataset, verdict).samples == 1
    assert not os.path.lexists(path)


@pytest.mark.parametrize("kind", ["missing", "empty", "flip", "row", "directory", "quarantine", "card", "picture"])
def test_derived_files_are_checked_and_rewritten(dataset, madgen_here, kind):
    index = dataset.root / "index.parquet"
    before = index.read_bytes()
    if kind in ("missing", "directory"):
        index.unlink()
    if kind == "directory":
        index.mkdir()
    if kind == "empty":
        index.write_bytes(b"")
    if kind == "flip":
        index.write_bytes(before[:300] + bytes([before[300] ^ 1]) + before[301:])
    if kind == "row":
        content = json.loads(dataset.sidecar(NAMES[0]).read_text(encoding="utf-8"))
        content["samples"].reverse()
        dataset.sidecar(NAMES[0]).write_text(json.dumps(content), encoding="utf-8")
        assert madgen_here("index", "out").code == 0
        content["samples"].reverse()
        dataset.sidecar(NAMES[0]).write_text(json.dumps(content), encoding="utf-8")
    if kind == "quarantine":
        (dataset.root / "quarantine.jsonl").write_text("{}\n", encoding="utf-8")
    card = dataset.root / "README.md"
    if kind == "card":
        card.write_text(
            card.read_text(encoding="utf-8").replace("10 of 10 synthetic", "9 of 10 synthetic"), encoding="utf-8"
        )
    if kind == "picture":
        (dataset.root / "samples/1.jpg").write_bytes(b"")
    verdict = verify(dataset)
    assert (exit_code(verdict), len(verdict.derived), verdict.broken) == (1, 1, {}), verdict.problems
    assert madgen_here("verify", "out", "--repair").code == 1
    assert verify(dataset).complete
    assert index.read_bytes() == before


def test_indexes_of_earlier_versions_have_no_licences(dataset, madgen_here):
    index = dataset.root / "index.parquet"
    table = parquet.read_table(index)
    parquet.write_table(table.drop_columns(list(LICENCE_COLUMNS)), index)
    assert verify(dataset).complete
    changed = table.column_names.index("training_on_outputs")
    parquet.write_table(table.set_column(changed, "training_on_outputs", pa.array(["yes"] * len(table))), index)
    (problem,) = verify(dataset).problems
    assert "index.parquet: row 0 says training_on_outputs 'yes'" in problem


def test_edited_text_of_the_card_is_no_problem(dataset):
    with open(dataset.root / "README.md", "a", encoding="utf-8") as card:
        card.write("\nMore about it.\n")
    assert verify(dataset).complete


EDITS = {
    "fingerprint": lambda content: content.update(fingerprint="0" * 32),
    "identity": lambda content: content["identity"]["sampling"].update(guidance_scale=9.0),
    "keys_sha256": lambda content: content["plan"].update(keys_sha256="0" * 64),
    "samples_per_shard": lambda content: content["plan"].update(samples_per_shard=4),
    "samples": lambda content: content["plan"].update(samples=11),
    "job": lambda content: content["job"]["output"].update(format="webp"),
    "section of the job": lambda content: content["job"].pop("sampling"),
    "cut": None,
}


@pytest.mark.parametrize("kind", EDITS)
def test_damaged_manifest_is_found_and_written_again(dataset, madgen_here, made, tmp_path, kind):
    content, shards = json.loads(dataset.manifest.read_bytes()), tars(dataset)
    before = Manifest.from_dict(json.loads(dataset.manifest.read_bytes()))
    if EDITS[kind] is None:
        dataset.manifest.write_bytes(dataset.manifest.read_bytes()[:200])
    else:
        EDITS[kind](content)
        dataset.manifest.write_text(json.dumps(content), encoding="utf-8")
    result = madgen_here("verify", "out", "--repair")
    assert (result.code, "rerun the job" in result.out + result.err) == (1, True)
    assert madgen_here("generate", made / "job.yaml", f"output.dir={tmp_path}/out").code == 0
    after = dataset.read_manifest()
    assert (after.fingerprint, after.identity, after.plan) == (before.fingerprint, before.identity, before.plan)
    assert (verify(dataset).problems, tars(dataset)) == ([], shards)


def test_identity_with_its_hash_is_another_job(dataset, madgen_here, made, tmp_path):
    content = json.loads(dataset.manifest.read_bytes())
    content["identity"]["sampling"]["guidance_scale"] = 9.0
    content["fingerprint"] = fingerprint(content["identity"])
    dataset.manifest.write_text(json.dumps(content), encoding="utf-8")
    assert len(verify(dataset).broken) == 4
    assert madgen_here("generate", made / "job.yaml", f"output.dir={tmp_path}/out").code == 2
