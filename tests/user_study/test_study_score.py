"""Score answers: known preferences are recovered, failed controls drop participants, invalid input is refused."""

import json
import re

import pytest
from study_data import TEXTS, answers_of, make_dataset, write_answers

from madgen.user_study.answers import read_answers, read_key
from madgen.user_study.design import Design
from madgen.user_study.intervals import win_rate
from madgen.user_study.make import make_study
from madgen.user_study.report import score_study
from madgen.user_study.score import score
from madgen.utils.errors import UserError


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    return [make_dataset(root / name, shade) for name, shade in (("mad", 40), ("multi", 120), ("sync", 200))]


@pytest.fixture
def study(tmp_path, roots):
    """A study of three datasets and two questions, eight pairs each, with ties."""
    folder = tmp_path / "study"
    make_study(roots, folder, Design(pairs=8, ties=True, questions=("coherence", "quality")))
    return folder


@pytest.fixture
def key(study):
    return json.loads((study / "key.json").read_text(encoding="utf-8"))


def pair_of(item, key):
    return tuple(sorted(key["pictures"][picture]["dataset"] for picture in item["pictures"]))


def by_names(report):
    return {(found["question"], found["first"], found["second"]): found for found in report["comparisons"]}


def scored(tmp_path, key, *answers, right=None):
    return score(read_answers(write_answers(tmp_path, *answers), key), key, right)


def test_known_preferences_are_recovered(tmp_path, key):
    """Coherence: mad beats multi and ties with sync; sync beats multi except for p1. Quality: mad loses to both."""

    def prefer(item):
        pair = pair_of(item, key)
        if pair == (1, 2):
            return 1 if item["prompt_id"] == "p1" else 2
        if item["question"] == "quality":
            return max(pair)
        return 0 if pair == (0, 1) else None

    answers = [answers_of(key, f"p{at}", prefer, swap=at % 2 == 1) for at in range(12)]
    found = by_names(scored(tmp_path, key, *answers))
    assert {names: row["overall"]["rate"] for names, row in found.items()} == {
        ("coherence", "mad", "multi"): 1.0,
        ("coherence", "mad", "sync"): 0.5,
        ("coherence", "multi", "sync"): 0.25,
        ("quality", "mad", "multi"): 0.0,
        ("quality", "mad", "sync"): 0.0,
        ("quality", "multi", "sync"): 0.25,
    }
    overall = found["coherence", "mad", "multi"]["overall"]
    assert (overall["wins"], overall["losses"], overall["ties"], overall["pairs"]) == (96, 0, 0, 8)
    assert (overall["participants"], overall["answers"]) == (12, 96)
    assert found["coherence", "mad", "sync"]["overall"]["ties"] == 96
    by_prompt = found["coherence", "multi", "sync"]["prompts"]
    assert {prompt: row["rate"] for prompt, row in by_prompt.items()} == {"p0": 0, "p1": 1, "p2": 0, "p3": 0}
    assert [row["prompt"] for row in by_prompt.values()] == list(TEXTS)


def test_interval_groups_answers_by_participant(tmp_path, key):
    """Eight participants always prefer one dataset, four the other: 12 opinions, whatever the number of answers."""
    preferences = [min] * 8 + [max] * 4
    answers = [
        answers_of(key, f"p{at}", lambda item, choose=choose: choose(pair_of(item, key)))
        for at, choose in enumerate(preferences)
    ]
    overall = by_names(scored(tmp_path, key, *answers))["coherence", "mad", "multi"]["overall"]
    expected = win_rate([[1.0] * 8] * 8 + [[0.0] * 8] * 4)
    assert (overall["low"], overall["high"]) == (expected.low, expected.high)
    assert overall["design_effect"] > 8


def test_participants_who_fail_controls_are_dropped(tmp_path, key):
    good = [
        answers_of(key, f"good{at}", lambda item: min(pair_of(item, key)), right) for at, right in enumerate((5, 6))
    ]
    bad = [answers_of(key, f"bad{at}", lambda item: max(pair_of(item, key)), right) for at, right in enumerate((4, 0))]
    early = answers_of(key, "early", lambda item: max(pair_of(item, key)))
    early["answers"] = [answer for answer in early["answers"] if "right" not in key["items"][answer["item"]]]
    report = scored(tmp_path, key, *good, *bad, early)
    assert {found["overall"]["rate"] for found in report["comparisons"]} == {1.0}
    assert report["participants"] == {
        "given": 5,
        "kept": 2,
        "dropped": {
            "bad0": {"right": 4, "answered": 6},
            "bad1": {"right": 0, "answered": 6},
            "early": {"right": 0, "answered": 0},
        },
    }
    assert scored(tmp_path, key, *good, *bad, early, right=0)["participants"]["kept"] == 5
    assert list(scored(tmp_path, key, *good, right=6)["participants"]["dropped"]) == ["good0"]


def test_no_participant_left_is_refused(tmp_path, key):
    bad = answers_of(key, "bad", lambda item: None, 0)
    with pytest.raises(UserError, match="0 of 1 participants pass 5 controls"):
        scored(tmp_path, key, bad)
    with pytest.raises(UserError, match="--right must be 0 to 6, the number of controls"):
        scored(tmp_path, key, bad, right=7)


def test_repeated_exports_count_once(tmp_path, key):
    full = answers_of(key, "one", lambda item: min(pair_of(item, key)))
    early = {**full, "answers": full["answers"][:20], "finished": False}
    people = read_answers(write_answers(tmp_path, early, full, full), key)
    assert [(person.name, len(person.answers)) for person in people] == [("one", len(full["answers"]))]


def test_conflicting_answers_of_one_participant_are_refused(tmp_path, key):
    answers = [answers_of(key, "one", lambda item, choose=choose: choose(pair_of(item, key))) for choose in (min, max)]
    with pytest.raises(
        UserError, match=r"answers-0\.json and .*answers-1\.json differ but are both of participant 'one'"
    ):
        scored(tmp_path, key, *answers)


DAMAGES = {
    "is not an answers file": lambda content: content.pop("madgen_study"),
    "answers another study, 'x'": lambda content: content.update(study="x"),
    "no participant": lambda content: content.update(participant=" "),
    "no list of answers": lambda content: content.update(answers={}),
    "an answer needs the fields item": lambda content: content["answers"].append("x"),
    "the study has no item q0": lambda content: content["answers"][0].update(item="q0"),
    "with the images": lambda content: content["answers"][0].update(first=content["answers"][0]["second"]),
    "must be first or second or same, got 'left'": lambda content: content["answers"][0].update(choice="left"),
    "must be first or second or same, got None": lambda content: content["answers"][0].pop("choice"),
    r"must be first or second or same, got \[\]": lambda content: content["answers"][0].update(choice=[]),
    "is answered twice": lambda content: content["answers"].append(content["answers"][0]),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_answers_are_refused_with_the_file_name(tmp_path, key, message):
    content = answers_of(key, "one", lambda item: None)
    DAMAGES[message](content)
    with pytest.raises(UserError, match=message) as refused:
        scored(tmp_path, key, content)
    assert "answers-0.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\udcff", '{"madgen_study": 1}'])
def test_other_files_are_refused(tmp_path, key, text):
    (tmp_path / "answers.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"answers\.json"):
        read_answers([tmp_path / "answers.json"], key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda key: key.pop("madgen_study"), "is not the key of a madgen study"),
        (lambda key: key.pop("items"), "was changed after the study was created"),
        (
            lambda key: key["pictures"][min(key["pictures"])].update(dataset=9),
            "was changed after the study was created",
        ),
        (lambda key: key.update(study="0" * 16), "was changed after the study was created"),
    ],
)
def test_changed_key_is_refused(study, key, damage, message):
    assert read_key(study) == key
    damage(key)
    (study / "key.json").write_text(json.dumps(key), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_key(study)


def test_ties_are_refused_unless_offered(tmp_path, roots):
    make_study(roots[:2], tmp_path / "study", Design(pairs=2))
    key = json.loads((tmp_path / "study" / "key.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="must be first or second, got 'same'"):
        scored(tmp_path, key, answers_of(key, "one", lambda item: None))


def test_report_escapes_names_and_prompts(tmp_path, study, key, capsys):
    path = write_answers(tmp_path, answers_of(key, "a|b <i>\n*c*", lambda item: min(pair_of(item, key))),
                         answers_of(key, "fails <b>", lambda item: None, 0))  # fmt: skip
    score_study(path, study, None, as_json=False)
    printed = capsys.readouterr().out
    assert printed == (study / "report.md").read_text(encoding="utf-8")
    assert r"- dropped: fails \<b\>, 0 of 6 correct" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert {len(line.replace("\\|", "").split("|")) for line in rows} == {10}
    assert "<script" in printed.replace("\\", "")  # as escaped text
    assert not re.search(r"(?<!\\)<", printed)
    assert "| **all** | 100.0% | 0.0% – 100.0% | 8 | 0 | 0 | 1 | 8.00 |" in rows
    report = json.loads((study / "report.json").read_text(encoding="utf-8"))
    score_study(path, study, None, as_json=True)
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("study mad", "two datasets or more"),
        ("study mad multi --pairs 0", "--pairs must be >= 1"),
        ("study mad multi --controls -1", "--controls must be >= 0"),
        ("study mad multi --question beauty", "--question: unknown 'beauty'; known: coherence, match, quality, both"),
        ("study mad multi --question match --question match", "--question match is given twice"),
        ("study mad multi -o mad", "-o mad is not empty"),
        ("study mad multi -o no/study", "-o no/study: the folder no does not exist"),
        ("study mad multi --right 5", "--right needs --score"),
        ("study mad multi --json", "--json needs --score"),
        ("study --score answers.json --question match", "--question cannot be combined with --score"),
        ("study --score answers.json --seed 1", "--seed cannot be combined with --score"),
        ("study --score answers.json", "cannot read study/key.json"),
        ("study --score answers.json -o mad", "cannot read mad/key.json"),
        ("study", "Missing argument"),
    ],
)
def test_invalid_input_exits_2_with_one_line(madgen_here, tmp_path, roots, arguments, message):
    for root in roots:
        (tmp_path / root.name).symlink_to(root)
    result = madgen_here(*arguments.split())
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mad", "multi", "sync"}


def test_report_contains_how_often_the_first_image_was_preferred(tmp_path, key):
    """Only kept participants and decided answers count; with swapped sides the shares add up to one."""
    shares = []
    for swap in (False, True):
        given = answers_of(key, "one", lambda item: min(pair_of(item, key)), swap=swap)
        report = scored(tmp_path, key, given, answers_of(key, "fails", lambda item: None, 0))
        asked = [answer for answer in given["answers"] if "right" not in key["items"][answer["item"]]]
        decided = [answer["choice"] for answer in asked if answer["choice"] != "same"]
        assert report["shown_first_preferred"] == decided.count("first") / len(decided)
        shares.append(report["shown_first_preferred"])
    assert sum(shares) == pytest.approx(1)
