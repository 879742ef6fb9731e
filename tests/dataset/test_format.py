"""Records of the JSON files: same bytes, earlier and later versions, one-line errors for damage."""

import json

import pytest

from madgen.dataset.format import FormatError, Manifest, Sidecar, to_json

SHAPE = {"height": 8, "width": 16}
ENTRY = {
    "key": "p-0000",
    "seed": 7,
    "prompt": "höhe",
    "offset": 0,
    "size": 512,
    "sha256": "00",
    "height": 8,
    "width": 16,
}
FIRST_VERSION = {
    "shard": "job-000000", "index": 0, "samples": [ENTRY], "quarantined": [], "seconds": {"sample": 1.5},
    "started": 1.0, "finished": 2.0, "worker": "w",
}  # fmt: skip
LOST = {"key": "p-0001", "seed": 8, "prompt": "a", "position": 1, "reason": "constant", "detail": "flat"}
SIDECAR = FIRST_VERSION | {
    "samples": [ENTRY | {"scores": {"seam": 1.0}}], "quarantine": [LOST], "quarantined": ["p-0001"],
    "view_evaluations": 12, "made": 1,
}  # fmt: skip
PLAN = {"prompts": 1, "samples": 2, "shards": 3, "samples_per_shard": 1, "keys_sha256": "00"}
MANIFEST = {"madgen": 1, "fingerprint": "f", "identity": {"a": 1}, "job": {"name": "job"}, "plan": PLAN, "versions": {}}


def test_files_are_written_with_the_bytes_they_were_read_from():
    assert Sidecar.from_json(to_json(SIDECAR), "s").to_json() == to_json(SIDECAR)
    for content in (MANIFEST, MANIFEST | {"licence": {"backbone": None}, "filtered": {"where": None}}):
        assert Manifest.from_json(to_json(content), "m").to_json() == to_json(content, indent=1)


def test_a_sidecar_of_the_first_version_is_read():
    sidecar = Sidecar.from_json(to_json(FIRST_VERSION), "s")
    assert (sidecar.quarantine, sidecar.made, sidecar.view_evaluations) == ((), 0, None)
    (entry,) = sidecar.samples
    assert (entry.shard, entry.prompt_id, entry.shape, entry.scores) == ("job-000000", "p", (8, 16), None)


def test_keys_of_later_versions_are_accepted_and_kept_where_filter_copies_records():
    sidecar = Sidecar.from_json(to_json(SIDECAR | {"new": 1, "samples": [ENTRY | {"depth": [1]}]}), "s")
    assert sidecar.samples[0].as_dict() == ENTRY | {"depth": [1]}
    assert Manifest.from_json(to_json(MANIFEST | {"new": 1}), "m").as_dict()["new"] == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 10**5, "recursion"),
        ("[]", "its content is [], expected an object"),
        (SIDECAR | {"shard": None}, "shard is None, expected a string"),
        (SIDECAR | {"samples": {}}, "samples is {}, expected a list"),
        (SIDECAR | {"samples": [ENTRY, {}]}, "samples[1].key is missing"),
        (SIDECAR | {"samples": [ENTRY | {"offset": -1}]}, "samples[0].offset is -1, expected an integer >= 0"),
        (SIDECAR | {"samples": [ENTRY | {"size": True}]}, "samples[0].size is True, expected an integer >= 0"),
        (
            SIDECAR | {"samples": [ENTRY | {"scores": {"seam": "a"}}]},
            "samples[0].scores.seam is 'a', expected a number",
        ),
        (SIDECAR | {"quarantine": [LOST | {"position": "x" * 99}]}, f"quarantine[0].position is '{'x' * 59}, expected"),
    ],
)
def test_damage_is_one_line_with_file_key_and_value(data, message):
    with pytest.raises(FormatError) as error:
        Sidecar.from_json(data if isinstance(data, str) else json.dumps(data), "shards/job-000000.json")
    assert str(error.value).startswith("shards/job-000000.json is damaged: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": {}}, "job.name is None"),
        ({"plan": {}}, "plan.prompts is missing"),
        ({"fingerprint": 1}, "fingerprint is 1"),
    ],
)
def test_a_manifest_needs_name_plan_and_fingerprint(change, message):
    with pytest.raises(FormatError, match=f"dataset.json is damaged: {message}"):
        Manifest.from_json(json.dumps(MANIFEST | change), "dataset.json")
