from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from plans import table_of, tasks_of

from madgen.dataset.plan import Plan, batches
from madgen.types import Prompt
from madgen.utils.seeding import sample_seed


def plan(prompts=5, samples=2, shard=3, seed=0):
    lines = tuple(Prompt(f"p{i}", f"text {i}", "", 64, 64 * (1 + i % 2)) for i in range(prompts))
    return Plan("job", table_of(lines, samples), samples, shard, seed)


@given(prompts=st.integers(1, 20), samples=st.integers(1, 4), shard=st.integers(1, 9))
def test_every_sample_is_in_exactly_one_shard_in_order(prompts, samples, shard):
    made = plan(prompts, samples, shard)
    keys = [task.key for index in range(made.shard_count) for task in made.shard(index).tasks]
    assert keys == [f"p{i}-{j:04d}" for i in range(prompts) for j in range(samples)]
    assert len(keys) == made.samples


@given(prompts=st.integers(1, 12), shard=st.integers(1, 9), size=st.integers(1, 5))
def test_batches_cut_a_shard_without_loss_and_are_of_one_size(prompts, shard, size):
    made = plan(prompts, 2, shard)
    for index in range(made.shard_count):
        cut = list(batches(made.shard(index), lambda prompt: size))
        assert tuple(task for batch in cut for task in batch.tasks) == made.shard(index).tasks
        assert all(len(batch.tasks) <= size for batch in cut)
        assert all(len({(task.prompt.height, task.prompt.width) for task in batch.tasks}) == 1 for batch in cut)


def test_batches_hold_prompts_of_equal_batch_size():
    lines = tuple(Prompt(f"p{i}", f"text {i}", "", 64, 64) for i in range(7))
    made = Plan("job", table_of(lines, 1), 1, 7, 0)
    takes = {"p0": 2, "p1": 2, "p2": 2, "p3": 1, "p4": 3, "p5": 3, "p6": 3}
    cut = batches(made.shard(0), lambda prompt: takes[prompt.id])
    assert [[task.prompt.id for task in batch.tasks] for batch in cut] == [
        ["p0", "p1"], ["p2"], ["p3"], ["p4", "p5", "p6"]
    ]  # fmt: skip


def test_a_seed_depends_on_identity_alone():
    one, other = plan(shard=3), plan(shard=5)
    assert [task.seed for task in tasks_of(one)][:10] == [task.seed for task in tasks_of(other)][:10]
    assert tasks_of(one)[3].seed == sample_seed(0, "p1", 1)
    assert tasks_of(plan(seed=1))[3].seed != tasks_of(one)[3].seed


def test_seed_of_a_row_is_the_seed_of_its_first_sample():
    made = plan()
    made = replace(made, prompts=table_of([replace(made.prompts[0], seed=7), *made.prompts[1:]], 2))
    assert tasks_of(made)[0].seed == 7
    assert tasks_of(made)[1].seed == sample_seed(7, "p0", 1)


def test_seeds_are_48_bits_and_differ():
    seeds = {sample_seed(0, f"p{i}", j) for i in range(100) for j in range(10)}
    assert len(seeds) == 1000
    assert max(seeds) < 2**48


def test_digests_differ_between_plans():
    longer = replace(plan(), prompts=table_of([*plan().prompts[:-1], replace(plan().prompts[-1], width=640)], 2))
    assert plan().prompts_digest == plan(shard=4).prompts_digest
    assert len({made.prompts_digest for made in (plan(), plan(prompts=4), longer)}) == 3
    assert plan(shard=3).keys_digest == plan(shard=4).keys_digest != plan(prompts=4).keys_digest
