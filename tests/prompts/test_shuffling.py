"""Shuffled prompts, and the key prefix."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import table_of, tasks_of

from madgen import load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset.plan import build_plan
from madgen.prompts.reading import read_prompts
from madgen.utils.errors import UserError

LINES = [f'{{"prompt": "hill {number}"{", " * bool(number % 3)}{EXTRA}}}' for number in range(200)
         for EXTRA in [('"seed": 3', '"width": 256', "")[number % 3 - 1]]]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def read(source, batch_rows=50, **options):
    return read_prompts(PromptsConfig(source=str(source), **options), 64, 128, batch_rows)


def test_shuffling_permutes_the_prompts(source):
    plain, table = read(source), read(source, shuffle=True)
    assert list(table) != list(plain)
    by_id = sorted(plain, key=lambda prompt: prompt.id)
    assert sorted(table, key=lambda prompt: prompt.id) == by_id
    moved = [abs(row - list(plain).index(prompt)) for row, prompt in enumerate(table)]
    assert 50 < sum(moved) / len(moved) < 83  # 200 / 3 on average
    assert (
        table.location(7)
        == f"{source}:{LINES.index(next(line for line in LINES if table[7].text + chr(34) in line)) + 1}"
    )
    totals, plain_totals = (
        {size: replace(counts, first_row=None) for size, counts in each.header.totals.sizes.items()}
        for each in (table, plain)
    )
    assert totals == plain_totals


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 300), order=st.permutations(range(20)))
def test_the_order_depends_on_the_seed_and_the_ids_alone(tmp_path, batch, order):
    lines = LINES[:20]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    wanted = read(path, shuffle=True)
    path.write_text("\n".join(lines[row] for row in order), encoding="utf-8")
    table = read(path, batch, shuffle=True)
    assert list(table) == list(wanted)
    assert table.header.prompts_digest == wanted.header.prompts_digest == table_of(wanted).header.prompts_digest
    assert table.header.keys_digest == wanted.header.keys_digest
    assert list(read(path, shuffle=True, seed=1)) != list(wanted)


def test_shuffled_samples_keep_keys_and_seeds(source):
    def plan(*overrides):
        return build_plan(load_job([], [f"prompts.source={source}", "prompts.samples_per_prompt=2", *overrides]))

    def tasks(plan):
        return tasks_of(plan)

    usual, shuffled = plan(), plan("prompts.shuffle=true")
    assert {(task.key, task.seed) for task in tasks(usual)} == {(task.key, task.seed) for task in tasks(shuffled)}
    assert usual.prompts_digest != shuffled.prompts_digest
    prefixed = plan("output.key_prefix=a_")
    assert [task.key for task in tasks(prefixed)] == ["a_" + task.key for task in tasks(usual)]
    assert [task.seed for task in tasks(prefixed)] == [task.seed for task in tasks(usual)]
    assert prefixed.prompts_digest == usual.prompts_digest
    assert len({usual.keys_digest, shuffled.keys_digest, prefixed.keys_digest}) == 3
    assert len({usual.key, shuffled.key, prefixed.key, plan("prompts.shuffle=true", "prompts.seed=1").key}) == 4


@pytest.mark.parametrize("prefix", ["a.b", "ä", "x" * 33, "a/b", "a b"])
def test_invalid_prefixes_are_refused(prefix):
    with pytest.raises(UserError, match=r"output\.key_prefix must be at most 32 of \[A-Za-z0-9_-\]"):
        load_job([], [f"output.key_prefix={prefix}"])


def test_comment_lines_are_ignored_by_option(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("# list of hills\na hill\n  # indented\na lake # not a comment\n\n#\n", encoding="utf-8")
    table = read(path, comments="#")
    assert [prompt.text for prompt in table] == ["a hill", "a lake # not a comment"]
    assert table.location(1) == f"{path}:4"
    assert len(read(path)) == 5
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.comments does not apply to .*p\.jsonl, only to \.txt"):
        read(tmp_path / "p.jsonl", comments="#")
