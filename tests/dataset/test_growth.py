"""Growing a dataset: what is planned, and that old shards stay as they are."""

import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from plans import table_of
from rewriting import and_embedded, changed, rewrite
from without_model import prompts_of, write

from madgen import load_job
from madgen.dataset import manifest
from madgen.dataset.format import FormatError, Manifest
from madgen.dataset.growth import CannotGrowError, join
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan, build_plan
from madgen.dataset.verify import verify
from madgen.planning.order import shard_costs
from madgen.prompts.builder import TableBuilder
from madgen.prompts.digests import PromptsDigest
from madgen.prompts.rows import Defaults
from madgen.types import Prompt, sample_key

JOB = load_job([], ["name=job", "prompts.samples_per_prompt=2", "output.samples_per_shard=3"])
TEXTS = [f"fjord {number}" for number in range(20)]


def plan_of(texts, each=2, per_shard=3, **fields):
    prompts = (Prompt(text.replace(" ", "_"), text, "", 16, 32, **fields) for text in texts)
    return Plan("job", table_of(prompts, each), each, per_shard, 0)


def content_of(plan):
    return manifest.manifest(JOB, plan, job_identity(JOB, plan, "float32", WeightIds("w")))


class Dataset:
    """A dataset of several generations that exists as `dataset.json`, with all plans that it ever had."""

    def __init__(self, root, saves=True):
        self.directory, self.saves = DatasetDir(root), saves

    def generate(self, plan, extend=True):
        """Do what `generate` does with `dataset.json`, and save the plan as it does."""
        plan = join(plan, self.directory, extend)
        content = content_of(plan)
        manifest.create(self.directory, content, "extend")
        manifest.extend(self.directory, content)
        manifest.check_directory(self.directory, content, "extend")
        if self.saves:
            self.directory.make_in_work(self.directory.plans)
            replace(plan, key=plan.prompts.header.prompts_digest).save(self.directory.plans)
        return plan

    @property
    def manifest(self):
        return self.directory.read_manifest()


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path / "out")


def shards(plan):
    return [[task.key for task in plan.shard(index).tasks] for index in range(plan.shard_count)]


def tasks(plan):
    return {task.key: task for index in range(plan.shard_count) for task in plan.shard(index).tasks}


def keys(numbers, samples=range(2)):
    return [sample_key("", f"fjord_{number}", sample) for number in numbers for sample in samples]


def test_new_prompts_follow_in_shards_of_their_own(dataset):
    old = shards(dataset.generate(plan_of(TEXTS[:5])))
    assert list(map(len, old)) == [3, 3, 3, 1]
    grown = dataset.generate(plan_of(TEXTS[:7]))
    assert shards(grown)[:4] == old
    assert shards(grown)[4:] == [keys([5, 6])[:3], keys([5, 6])[3:]]
    assert dataset.manifest.plan.as_dict() | {"keys_sha256": ""} == {
        "prompts": 7, "samples": 14, "shards": 6, "samples_per_shard": 3, "keys_sha256": "",
    }  # fmt: skip


def test_more_samples_of_each_prompt_follow(dataset):
    old = shards(dataset.generate(plan_of(TEXTS[:3])))
    grown = dataset.generate(plan_of(TEXTS[:4], each=4))
    assert shards(grown)[: len(old)] == old
    added = [key for shard in shards(grown)[len(old) :] for key in shard]
    assert added == keys(range(3), range(2, 4)) + keys([3], range(4))


@pytest.mark.parametrize("each", [2, 3])
def test_samples_of_a_grown_dataset_are_those_of_a_new_one(dataset, each):
    """Keys, prompts and seeds do not depend on the generation in which a sample is made."""
    for count in (5, 6, 11):
        dataset.generate(plan_of(TEXTS[:count]))
    grown = dataset.generate(plan_of(TEXTS, each))
    assert tasks(grown) == tasks(plan_of(TEXTS, each))
    assert sum(map(len, shards(grown))) == grown.samples


def test_costs_of_shards_are_those_of_their_tasks(dataset):
    def cost(prompt):
        return prompt.width

    def mixed(count):
        sizes = [(32, 16, 48)[number % 3] for number in range(count)]
        prompts = [Prompt(f"p{number}", "text", "", 16, size) for number, size in enumerate(sizes)]
        random.Random(count).shuffle(prompts[:5])
        return prompts

    for count, each in ((5, 2), (9, 3), (10, 5)):
        plan = dataset.generate(Plan("job", table_of(mixed(count), each), each, 3, 0))
    expected = [sum(cost(task.prompt) for task in plan.shard(index).tasks) for index in range(plan.shard_count)]
    assert shard_costs(plan, cost) == expected


def test_old_prompts_may_lie_between_new_ones(dataset):
    """They are recognized by their saved plan, and afterwards by `dataset.json` alone."""
    chosen = TEXTS[3:18:4]
    old = shards(dataset.generate(plan_of(chosen)))
    between = TEXTS[1:19]
    grown = shards(dataset.generate(plan_of(between)))
    last = shards(dataset.generate(plan_of(TEXTS, 3)))
    assert grown[: len(old)] == old
    assert last[: len(grown)] == grown
    assert sorted(key for shard in last for key in shard) == sorted(keys(range(20), range(3)))
    for path in dataset.directory.plans.glob("*"):
        path.unlink()
    assert shards(join(plan_of(TEXTS, 3), dataset.directory, extend=False)) == last


def test_jobs_of_earlier_generations_keep_to_their_shards(dataset):
    """A worker that is requeued with the old job goes on, and leaves the rest to the others."""
    old = dataset.generate(plan_of(TEXTS[:5]))
    middle = dataset.generate(plan_of(TEXTS[:6]))
    dataset.generate(plan_of(TEXTS[:9]))
    written = dataset.manifest
    for plan in (old, middle):
        again = dataset.generate(plan_of(TEXTS[: len(plan.prompts)]))
        assert shards(again) == shards(plan)
        assert content_of(again).fingerprint == written.generations[len(plan.grown or (0,)) - 1].fingerprint
    assert dataset.manifest == written


def test_generations_are_recorded(dataset):
    for count, each in ((5, 2), (6, 2), (6, 3)):
        dataset.generate(plan_of(TEXTS[:count], each))
    first, second, third = dataset.manifest.generations
    assert (first.prompts, first.samples, first.shards, first.samples_per_prompt) == (5, 10, 4, 2)
    assert (second.prompts, second.samples, second.shards, second.samples_per_prompt) == (1, 2, 1, 2)
    assert (third.prompts, third.samples, third.shards, third.samples_per_prompt) == (0, 6, 2, 3)
    assert first.fingerprint == content_of(plan_of(TEXTS[:5])).fingerprint
    assert third.fingerprint == dataset.manifest.fingerprint
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    index = [dataset.manifest.shard_fingerprint(index) for index in range(7)]
    assert index == [first.fingerprint] * 4 + [second.fingerprint] + [third.fingerprint] * 2


def test_datasets_that_did_not_grow_have_no_generations(dataset):
    dataset.generate(plan_of(TEXTS[:5]))
    assert b"generations" not in dataset.directory.manifest.read_bytes()
    assert b"extends" not in dataset.directory.manifest.read_bytes()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of(TEXTS[:4]), r"its prompt 'fjord 4' \(id fjord_4\) is not among the prompts of the job"),
        (plan_of([*TEXTS[:4], *TEXTS[5:8]]), r"its prompt 'fjord 4' \(id fjord_4\) is not among the prompts"),
        (plan_of(TEXTS[:6], 1), "prompts.samples_per_prompt is 1, and it has 2 of each prompt already"),
        (plan_of([*reversed(TEXTS[:5]), "new"]), r"its prompt 'fjord 0' \(id fjord_0\) is not in the same order"),
        (plan_of(TEXTS[:6], seed=7), "one has another size, seed, region or place now"),
    ],
)
def test_removed_and_changed_prompts_are_refused(dataset, plan, reason):
    dataset.generate(plan_of(TEXTS[:5]))
    before = dataset.directory.manifest.read_bytes()
    with pytest.raises(CannotGrowError, match=reason):
        dataset.generate(plan)
    assert dataset.directory.manifest.read_bytes() == before


def test_prompts_between_unknown_ones_are_refused(tmp_path):
    """Without sidecars and saved plans nobody knows what the dataset has."""
    dataset = Dataset(tmp_path / "out", saves=False)
    dataset.generate(plan_of(TEXTS[1:5]))
    with pytest.raises(CannotGrowError, match="append new prompts to the old ones, or finish the dataset first"):
        dataset.generate(plan_of(TEXTS[:5]))


def test_only_the_extension_of_the_newest_generation_is_recorded(dataset):
    """Of two jobs that extend a dataset at the same time, the slower one is refused."""
    dataset.generate(plan_of(TEXTS[:5]))
    slow = content_of(join(plan_of([*TEXTS[:5], "slow"]), dataset.directory, extend=True))
    dataset.generate(plan_of([*TEXTS[:5], "fast"]))
    written = dataset.manifest
    manifest.extend(dataset.directory, slow)
    assert dataset.manifest == written
    with pytest.raises(Exception, match="holds a dataset of another job"):
        manifest.check_directory(dataset.directory, slow, "extend")


@pytest.mark.parametrize("damage", ["", "AAAA", "!", "eJw="])
def test_damaged_marks_of_old_prompts_are_no_plan(dataset, damage):
    dataset.generate(plan_of(TEXTS[1:4]))
    dataset.generate(plan_of(TEXTS[:4]))
    content = dataset.manifest
    generations = (content.generations[0], replace(content.generations[1], earlier=damage))
    dataset.directory.manifest.write_bytes(replace(content, generations=generations).to_json())
    assert not join(plan_of(TEXTS[:4]), dataset.directory, extend=False).grown


def test_prompts_of_a_shuffled_job_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, source = Dataset(tmp_path / "out"), tmp_path / "p.txt"

    def plan(count):
        source.write_text("".join(f"{text}\n" for text in TEXTS[:count]), encoding="utf-8")
        return build_plan(load_job([], ["name=job", "prompts.source=p.txt", "prompts.shuffle=true"]))

    old = dataset.generate(plan(15))
    grown = dataset.generate(plan(20))
    assert dataset.manifest.generations[1].earlier is not None
    assert [part.tasks for part in map(grown.shard, range(old.shard_count))] == [
        part.tasks for part in map(old.shard, range(old.shard_count))
    ]
    assert tasks(grown).keys() == tasks(plan(20)).keys()


def test_manifest_of_a_grown_dataset_survives_parsing(dataset):
    for count in (3, 5):
        dataset.generate(plan_of(TEXTS[20 - count :]))
    content = dataset.manifest
    assert Manifest.from_json(content.to_json(), "dataset.json") == content


def test_digest_of_a_subset_is_that_of_its_table():
    """For rows with and without fields of their own, and across record batches."""
    prompts = [
        Prompt(
            f"p{number}",
            f"text {number}",
            "blurry" if number % 3 == 0 else "",
            16,
            32 + 16 * (number % 2),
            seed=number if number % 5 == 0 else None,
            columns={"n": number} if number % 4 == 0 else {},
        )
        for number in range(23)
    ]
    config = load_job().prompts
    builder = TableBuilder(config, Defaults("", 16, 32), ["prompts"], batch_rows=4)
    for line, prompt in enumerate(prompts):
        builder.add(prompt, 0, line)
    table = builder.finish()
    assert len(table.batches) > 3
    for rows in (range(23), range(5), range(3, 17), np.array([0, 3, 4, 9, 22]), range(7, 7)):
        chosen = [prompts[row] for row in rows]
        expected = table_of(chosen).header.prompts_digest if chosen else PromptsDigest().hexdigest()
        assert table.subset_digest(rows) == expected
        assert [identity for chunk in table.subset_ids(rows) for identity in chunk] == [item.id for item in chosen]
        assert table.rows_with_ids(pa.array([item.id for item in chosen], pa.string())).tolist() == list(rows)


@pytest.mark.parametrize("change", [changed(seed=7), changed(prompt="another"), changed(negative_prompt="dark")])
def test_later_samples_are_compared_with_the_first_ones_of_their_prompt(tmp_path, change):
    """JSON, image, text and sidecar of the second generation agree; only the first generation does not."""
    directory = write(tmp_path / "out", prompts_of(TEXTS[:3]))
    write(directory.root, prompts_of(TEXTS[:3]), "prompts.samples_per_prompt=2")
    assert verify(directory).complete
    rewrite(directory, "made-000001", and_embedded(change))
    assert any("made-000001: fjord_0-0001: its " in problem for problem in verify(directory).problems)


@pytest.mark.parametrize("change", [changed(seed=7), changed(prompt="another"), changed(negative_prompt="dark")])
def test_prompts_of_later_generations_are_compared_with_their_plan(tmp_path, change):
    directory = write(tmp_path / "out", prompts_of(TEXTS[1:4]))
    write(directory.root, prompts_of(TEXTS[:5]))
    assert verify(directory).complete
    rewrite(directory, "made-000001", and_embedded(change))
    assert verify(directory).problems == ["prompts, sizes or seeds are not the planned ones"]


def test_shards_of_other_generations_are_found(tmp_path):
    directory = write(tmp_path / "out", prompts_of(TEXTS[:3]))
    rewrite(directory, "made-000000", lambda metadata, members, entry: None)
    write(directory.root, prompts_of(TEXTS[:6]))
    rewrite(
        directory,
        "made-000001",
        and_embedded(changed(fingerprint=directory.read_manifest().generations[0].fingerprint)),
    )
    assert any("it is a sample of another dataset" in problem for problem in verify(directory).problems)


@pytest.mark.parametrize("seed", [None, 7])
def test_samples_of_several_generations_have_the_seeds_of_their_prompt(tmp_path, seed):
    """Also those of the last prompt of a generation."""
    for count, each in ((2, 1), (2, 2), (3, 2), (4, 4), (5, 5)):
        directory = write(tmp_path / "out", prompts_of(TEXTS[:count], seed=seed), f"prompts.samples_per_prompt={each}")
        verdict = verify(directory)
        assert verdict.complete, verdict.problems
    rewrite(directory, directory.read_manifest().shard_names()[-1], and_embedded(changed(seed=8)))
    assert verify(directory).problems


def test_unreadable_manifest_of_a_grown_dataset_is_not_blamed_on_the_job(tmp_path):
    write(tmp_path / "out", prompts_of(TEXTS[:4]))
    grown = write(tmp_path / "out", prompts_of(TEXTS[:6]))
    before = grown.read_manifest()
    grown.manifest.write_bytes(grown.manifest.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"no job alone can write it again, because the dataset has grown .* a copy"):
        manifest.check_directory(grown, replace(before, generations=None), "extend")
    grown.manifest.write_bytes(before.to_json())
    assert verify(grown).complete
