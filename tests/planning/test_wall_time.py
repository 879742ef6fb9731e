"""Hours and wall time from finished shards; nodes and time limit for `submit`."""

import json
import random

import pytest

from madgen.planning.order import makespan
from madgen.planning.sizing import START_S, nodes_within, parse_count, parse_time, time_for
from madgen.planning.wall_time import Estimate, Measured, measure
from madgen.utils.errors import UserError


def remaining(missing, per_evaluation=2.0):
    return Estimate(Measured(per_evaluation, 5), missing)


@pytest.mark.parametrize(
    ("costs", "workers", "expected"),
    [([], 3, 0), ([5], 3, 5), ([3, 3, 2, 2, 2], 2, 7), ([4, 4, 4], 2, 8), ([1] * 10, 1, 10), ([9, 1, 1, 1], 2, 9)],
)
def test_makespan_equals_known_schedules(costs, workers, expected):
    assert makespan(costs, workers) == expected


@pytest.mark.parametrize("seed", range(20))
def test_makespan_is_within_its_bounds(seed):
    rng = random.Random(seed)
    costs = [rng.uniform(1, 10) for _ in range(rng.randint(1, 60))]
    workers = rng.randint(1, 20)
    lower = max(sum(costs) / workers, max(costs))
    assert lower - 1e-9 <= makespan(costs, workers) <= (4 / 3) * lower + max(costs)


def test_hours_and_wall_time_of_the_remaining_shards():
    estimate = remaining([1800.0, 1800.0, 1800.0])
    assert estimate.device_hours == pytest.approx(3.0)
    assert [estimate.wall_s(workers) for workers in (1, 2, 3, 9)] == [10800, 7200, 3600, 3600]


@pytest.mark.parametrize("within", [3600, 3601, 7199, 7200, 10800])
def test_fewest_workers_is_minimal(within):
    estimate = remaining([1800.0, 1800.0, 1800.0])
    fewest = estimate.fewest_workers(within)
    assert estimate.wall_s(fewest) <= within
    assert fewest == 1 or estimate.wall_s(fewest - 1) > within


def test_shard_longer_than_the_time_limit_is_an_error():
    with pytest.raises(UserError, match=r"one shard takes 60 min, but only 50 min .* lower output"):
        remaining([1800.0]).fewest_workers(3000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("1-0", 86400), ("2-12", 216000), ("1-01:30", 91800),
        ("1-01:30:15", 91815),
    ],
)  # fmt: skip
def test_slurm_times_are_parsed(text, expected):
    assert parse_time(text) == expected


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
@pytest.mark.parametrize("shards", [0, 1, 7])
def test_time_limit_suffices_and_needs_no_more_nodes(workers, shards):
    estimate = remaining([1000.0] * shards)
    time = time_for(estimate, workers)
    assert parse_time(time) >= START_S + estimate.wall_s(workers)
    assert nodes_within(estimate, time, tasks_per_node=1) <= workers


def test_counts_are_parsed():
    assert (parse_count("--nodes", "4"), parse_count("--nodes", "auto")) == (4, None)
    with pytest.raises(UserError, match="--nodes must be a whole number or auto, got 'many'"):
        parse_count("--nodes", "many")


def test_no_throughput_before_a_shard_is_finished(tmp_path):
    assert measure(tmp_path) is None
    with pytest.raises(UserError, match="no finished shard"):
        measure(tmp_path, required=True)


@pytest.fixture
def trial(madgen, job_file):
    """Four panoramas of the job, in `trial`."""
    assert madgen("generate", job_file, "prompts.limit=4", "output.dir=trial", "output.samples_per_shard=2").code == 0
    return job_file


@pytest.mark.slow
def test_throughput_is_taken_from_a_trial(madgen, trial, tmp_path):
    sidecars = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((tmp_path / "trial/shards").glob("*.json"))
    ]
    whole = json.loads(madgen("plan", trial, "prompts.limit=4", "--json").out)
    assert sum(sidecar["view_evaluations"] for sidecar in sidecars) == whole["view_evaluations"]

    planned = madgen("plan", trial, "output.samples_per_shard=1", "--measured=trial", "--workers=2", "--json")
    printed = json.loads(planned.out)
    busy = sum(sidecar["seconds"][name] for sidecar in sidecars for name in ("sample", "decode", "wait"))
    assert printed["seconds_per_view_evaluation"] == pytest.approx(busy / whole["view_evaluations"])
    assert printed["measured_shards"] == len(sidecars)
    assert printed["shards_left"] == printed["shards"]
    hours = printed["view_evaluations"] * printed["seconds_per_view_evaluation"] / 3600
    assert printed["device_hours_left"] == pytest.approx(hours)
    assert hours * 3600 / 2 <= printed["wall_s"] * (1 + 1e-9)

    text = madgen("plan", trial, "--measured=trial", "--workers=2").out
    assert "device hours" in text
    assert "2 workers: " in text

    here = json.loads(madgen("plan", trial, "output.dir=trial", "prompts.limit=4", "output.samples_per_shard=2",
                             "--workers=2", "--json").out)  # fmt: skip
    assert (here["shards_left"], here["device_hours_left"], here["wall_s"]) == (0, 0, 0)

    script = madgen("submit", trial, "trainer.devices=auto", "--measured=trial", "--tasks-per-node=2",
                    "--time=auto", "--dry-run")  # fmt: skip
    assert script.code == 0, script.err
    assert "#SBATCH --time=00:15:00" in script.out
    assert "--time=00:15:00" in script.err
    script = madgen("submit", trial, "--measured=trial", "--nodes=auto", "--time=1:00:00", "--dry-run")
    assert "#SBATCH --nodes=1\n" in script.out
