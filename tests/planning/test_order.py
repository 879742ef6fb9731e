import pytest
from plans import table_of

from madgen.dataset.plan import Plan, build_plan
from madgen.planning.order import claim_order, rotated, shard_costs
from madgen.types import Box, Prompt, Region


def cost(prompt):
    return prompt.width * (1 + len(prompt.regions))


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("per_shard", [1, 4, 7, 100])
def test_shard_cost_is_the_sum_over_its_tasks(each, per_shard):
    regions = (Region(Box(0, 0, 4, 4), "a hut"),)
    prompts = [Prompt(f"p{i}", "text", "", 8, (16, 32, 8)[i % 3], None, regions if i == 5 else ()) for i in range(11)]
    plan = Plan("job", table_of(prompts, each), each, per_shard, 0)
    naive = [sum(cost(task.prompt) for task in plan.shard(index).tasks) for index in range(plan.shard_count)]
    assert shard_costs(plan, cost) == naive


def test_prompts_without_own_size_cost_what_the_job_says(tmp_path, monkeypatch):
    from madgen.config.loader import load_job

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b", "width": 64}\n{"prompt": "c"}\n', encoding="utf-8"
    )
    job = load_job([], ["prompts.source=p.jsonl", "sampling.width=16", "output.samples_per_shard=2"])
    assert shard_costs(build_plan(job), cost) == [80, 16]


def test_longest_shards_come_first_and_rotation_changes_only_the_start():
    assert claim_order([1, 3, 2, 3]) == [1, 3, 2, 0]
    assert rotated([1, 3, 2, 0], 5) == [3, 2, 0, 1]
    assert rotated([], 5) == []
