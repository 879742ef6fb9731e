"""Prompts from a template and its attributes."""

import itertools
import json
from collections import Counter

import pytest

from madgen import load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset.plan import build_plan
from madgen.prompts.cache import plan_key
from madgen.prompts.reading import read_prompts
from madgen.prompts.rows import default_id
from madgen.utils.errors import UserError

PLACES = ["Rome", "the sea", "a {cave}"]
ATTRIBUTES = {"time": ["dawn", "noon"], "place": PLACES, "count": [2, 10]}
TEMPLATE = "{count} views of {place} at {time} {{sic}}, {time}"


def read(**options):
    return list(read_prompts(PromptsConfig(**{"template": TEMPLATE, "attributes": ATTRIBUTES, **options}), 64, 128))


def test_all_combinations_are_prompts_with_their_attributes_as_columns():
    prompts = read()
    wanted = {
        f"{count} views of {place} at {time} {{sic}}, {time}": {"count": count, "place": place, "time": time}
        for time, place, count in itertools.product(ATTRIBUTES["time"], PLACES, [2, 10])
    }
    assert {prompt.text: prompt.columns for prompt in prompts} == wanted
    assert all(prompt.id == default_id(prompt.text) for prompt in prompts)  # those of a file with these lines
    assert [prompt.text for prompt in read(limit=3)] == [prompt.text for prompt in prompts[:3]]


@pytest.mark.parametrize("samples", [None, 500])
def test_ids_do_not_depend_on_the_order_of_attributes_and_values(samples):
    backwards = {name: list(reversed(ATTRIBUTES[name])) for name in reversed(ATTRIBUTES)}
    one, other = read(samples=samples), read(samples=samples, attributes=backwards)
    assert {(prompt.id, prompt.text) for prompt in one} == {(prompt.id, prompt.text) for prompt in other}
    if samples:
        assert [prompt.id for prompt in one] == [prompt.id for prompt in other]


def test_random_combinations_follow_the_weights():
    attributes = {
        "time": {"values": ["dawn", "noon", "never"], "weights": [3, 1, 0]},
        "place": {"values": PLACES},
        "count": [1],
    }
    drawn = [prompt.columns for prompt in read(samples=4000, attributes=attributes)]
    assert len(drawn) == 4000
    times = Counter(columns["time"] for columns in drawn)
    pairs = Counter((columns["time"], columns["place"]) for columns in drawn)
    assert set(times) == {"dawn", "noon"}
    assert abs(times["dawn"] - 3000) < 5 * (4000 * 0.75 * 0.25) ** 0.5
    for place in PLACES:  # attributes are drawn independently
        assert abs(pairs["dawn", place] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
        assert abs(pairs["noon", place] - 333) < 5 * (4000 / 12 * 11 / 12) ** 0.5


def test_more_samples_and_more_values_keep_the_earlier_draws():
    few, many = read(samples=20), read(samples=9000)
    assert many[:20] == few
    assert [prompt.text for prompt in read(samples=20, seed=1)] != [prompt.text for prompt in few]
    more = read(samples=9000, attributes={**ATTRIBUTES, "place": [*PLACES, "a new place"]})
    kept = [new.columns for new in more if new.columns["place"] != "a new place"]
    assert 0.7 < len(kept) / 9000 < 0.8
    assert all(
        new.columns in (old.columns, {**old.columns, "place": "a new place"})
        for old, new in zip(many, more, strict=True)
    )


def test_equal_combinations_are_renamed_or_skipped():
    renamed = read(samples=200)
    assert len({prompt.id for prompt in renamed}) == 200
    first = renamed[0].text
    ids = [prompt.id for prompt in renamed if prompt.text == first]
    assert ids[:2] == [default_id(first), default_id(first) + "-2"]
    distinct = read(samples=200, on_duplicate="skip")
    assert len(distinct) == len({prompt.text for prompt in renamed}) <= 12


def test_templates_in_job_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("not read\n", encoding="utf-8")
    job = tmp_path / "job.yaml"
    job.write_text(
        'prompts:\n  template: "a {time} view of {place}"\n  samples: 5\n'
        "  attributes: {time: [dawn, noon], place: {values: [Rome, Paris], weights: [3, 1]}}\n",
        encoding="utf-8",
    )
    plan = build_plan(load_job(job))
    assert len(plan.prompts) == 5
    plan.save(tmp_path / "cache")
    assert list(build_plan(load_job(job), tmp_path / "cache").prompts) == list(plan.prompts)
    assert plan_key(load_job(job, ["prompts.seed=1"])) != plan.key
    override = ["prompts.template=a {x}", f"prompts.attributes={json.dumps({'x': ['b', 'c']})}"]
    assert [prompt.text for prompt in build_plan(load_job([], override)).prompts] == ["a b", "a c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "a {plase}", "attributes": {"place": ["x"]}}, r"\{plase\} is not one of .*mean 'place'"),
        ({"template": "a {x}", "attributes": {}}, r"\{x\} is not one of prompts.attributes$"),
        ({"attributes": {**ATTRIBUTES, "extra": ["x"]}}, r"prompts\.attributes\.extra does not occur"),
        ({"template": "a view"}, r"has no attribute such as \{place\}"),
        ({"template": "a {"}, r"write \{\{ and \}\} for braces"),
        ({"template": "a }"}, r"write \{\{ and \}\} for braces"),
        ({"template": "a {}"}, r"an attribute is a name .* got \{\}"),
        ({"template": "a {time!r}"}, r"got \{time!r\}"),
        ({"template": "a {time:>9}"}, r"got \{time:>9\}"),
        ({"template": "a {time.__class__}"}, r"got \{time.__class__\}"),
        ({"template": "a {0}"}, r"got \{0\}"),
        ({"attributes": {**ATTRIBUTES, "time": []}}, r"prompts\.attributes\.time must be a list of values"),
        ({"attributes": {**ATTRIBUTES, "time": "dawn"}}, r"time must be a list of values such as .* got 'dawn'"),
        ({"attributes": {**ATTRIBUTES, "time": [False]}}, r"time: a value must be a string or a number, got False"),
        ({"attributes": {**ATTRIBUTES, "time": [None]}}, r"time: a value must be a string or a number, got None"),
        ({"attributes": {**ATTRIBUTES, "time": ["1", 1]}}, r"time lists '1' twice"),
        ({"attributes": {**ATTRIBUTES, "time": {"weights": [1]}}}, r"time must be a list of values or \{values"),
        ({"attributes": {**ATTRIBUTES, "time": {"values": ["a"], "weight": [1]}}}, "time must be a list of values or"),
        ({"attributes": {**ATTRIBUTES, "time": {"values": ["a"], "weights": [1]}}}, r"weights have no effect"),
        ({"samples": 3, "attributes": {**ATTRIBUTES, "time": {"values": ["a"], "weights": [1, 2]}}}, "1 values, but 2"),
        ({"samples": 3, "attributes": {**ATTRIBUTES, "time": {"values": ["a"], "weights": [-1]}}}, r"numbers >= 0"),
        ({"samples": 3, "attributes": {**ATTRIBUTES, "time": {"values": ["a"], "weights": [0]}}}, r"weights are all 0"),
        ({"samples": 0}, r"prompts\.samples must be > 0 or null, got 0"),
        ({"template": None}, r"prompts\.attributes has no effect without prompts\.template"),
        ({"template": None, "attributes": {}, "samples": 3}, r"prompts\.samples has no effect without"),
        ({"source": "p.csv"}, r"prompts\.template and prompts\.source=p\.csv exclude each other"),
        ({"columns": {"prompt": "x"}}, r"prompts\.columns has no effect with prompts\.template"),
        ({"keep_columns": "all"}, r"prompts\.keep_columns has no effect with prompts\.template"),
        ({"attributes": {"time": list(range(2048)), "place": list(range(2048)), "count": list(range(2048))}},
         r"8,589,934,592 combinations, at most 4,294,967,295; set prompts\.samples"),
    ],
)  # fmt: skip
def test_invalid_templates_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        read(**options)


def test_equal_texts_of_different_attributes_are_duplicates():
    options = {"template": "{a}{b}", "attributes": {"a": ["x", "xy"], "b": ["yz", "z"]}}
    with pytest.raises(UserError, match=r"prompts\.template:4: same id as prompts\.template:1"):
        read(**options)
    assert len(read(**options, on_duplicate="skip")) == 3
