"""Arbitrary job and prompt files give a plan or one line, never a traceback."""

import json
import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madgen.config.loader import load_job
from madgen.config.schema import Job
from madgen.planning.forecast import forecast
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.errors import UserError

QUICK = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SECTIONS = {name: list(value) if isinstance(value, dict) else [] for name, value in Job().as_dict().items()}
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 100), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=20),
    st.sampled_from(["auto", "demo", "whole", "shifted", "always", "DDIMScheduler", "${oc.env:HOME}", "???"]),
    st.sampled_from([8 * 10**9, 2**31, 2**63, "../..", "webp", "/", "out", "prompts.txt"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
paths = st.one_of(
    st.sampled_from([(section, key) for section, keys in SECTIONS.items() for key in keys]),
    st.sampled_from([("method", a, b) for a in ("views", "mad", "sync", "regions")
                     for b in ("size", "stride", "steps", "blocks", "weight", "every", "layout", "bootstrapping")]),
    st.tuples(st.sampled_from(sorted(SECTIONS))),
    st.lists(st.text(max_size=10), min_size=1, max_size=3).map(tuple),
)  # fmt: skip


def plan(path, overrides=()):
    """What `madgen plan` does, up to printing."""
    job = load_job(path, list(overrides))
    return forecast(ResolvedRun.of(job), assume_spec=True)


def is_one_line(error):
    text = str(error)
    return bool(text.strip()) and "Traceback" not in text


@pytest.fixture
def job(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "prompts.txt").write_text("mountains\na meadow\n", encoding="utf-8")
    return {
        "backbone": {"pretrained": str(tiny)},
        "method": {"mad": {"steps": 1}},
        "sampling": {"height": 32, "width": 64, "num_inference_steps": 2},
        "prompts": {"source": "prompts.txt"},
        "output": {"dir": "out"},
    }


@pytest.mark.slow
@QUICK
@given(changes=st.lists(st.tuples(paths, values), min_size=1, max_size=3))
def test_random_jobs_load_or_raise_user_error(job, tmp_path, changes):
    content = json.loads(json.dumps(job))
    for path, value in changes:
        place = content
        for key in path[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[path[-1]] = value
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        plan(tmp_path / "job.yaml")
    except UserError as error:
        assert is_one_line(error)


@QUICK
@given(seed=st.integers(0, 2**32), cuts=st.integers(1, 8))
def test_damaged_job_files_load_or_raise_user_error(job, tmp_path, seed, cuts):
    """Bytes flipped, dropped and repeated anywhere in a good job file."""
    chance, data = random.Random(seed), bytearray(yaml.safe_dump(job).encode())
    for _ in range(cuts):
        place = chance.randrange(len(data))
        data[place : place + chance.randrange(3)] = bytes(chance.randrange(256) for _ in range(chance.randrange(3)))
    (tmp_path / "job.yaml").write_bytes(data)
    try:
        plan(tmp_path / "job.yaml")
    except UserError as error:
        assert is_one_line(error)


@QUICK
@given(
    key=st.text(max_size=20) | st.sampled_from([f"{a}.{b}" for a, keys in SECTIONS.items() for b in keys]),
    value=st.text(max_size=15),
)
def test_random_overrides_load_or_raise_user_error(job, tmp_path, key, value):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    try:
        plan(tmp_path / "job.yaml", [f"{key}={value}"])
    except UserError as error:
        assert is_one_line(error)


def paths_of(values, above=()):
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*above, key))


@pytest.mark.slow
def test_containers_in_every_key_load_or_raise_user_error(job, tmp_path):
    for path in paths_of(Job().as_dict()):
        for value in ([], {}, [1], [[]], [{}], {"a": 1}, {1: 2}, [None]):
            changed = json.loads(json.dumps(job))
            inner = changed
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
            (tmp_path / "job.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
            try:
                load_job("job.yaml")
            except UserError as error:
                assert is_one_line(error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.scheduler_options=[]", "sampling.scheduler_options is a mapping: write"),
        ("sampling.guidance_steps={a: 1}", "sampling.guidance_steps must be a list or null, got a mapping"),
        ("sampling.width={a: 1}", "sampling.width is one value, not a mapping, got "),
        ("sampling.width=[1]", "sampling.width is one value, not a list, got "),
        ("output.dir={}", "output.dir is one value, not a mapping, got "),
        ("scores.enabled={}", "scores.enabled must be a list or null, got a mapping"),
        ("method.mad.blocks={}", "method.mad.blocks is a list: write method.mad.blocks="),
    ],
)
def test_wrong_containers_are_named(job, tmp_path, override, message):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{message}"):
        load_job("job.yaml", [override])
