"""Compare intervals of win rates with scipy and published values, and measure their coverage."""

import random

import numpy as np
import pytest
from scipy import stats

from madgen.user_study.intervals import design_effect, wilson, win_rate


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_newcombe_table(wins, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(wins / count, count, 1.959964) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (5, 5), (3, 7), (60, 100), (999, 1000)])
def test_wilson_matches_scipy(wins, count):
    expected = stats.binomtest(wins, count).proportion_ci(0.95, "wilson")
    assert wilson(wins / count, count, stats.norm.ppf(0.975)) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (120, 1.980)])
def test_interval_uses_students_t_of_published_tables(freedom, value):
    found = win_rate([[1.0]] * (freedom + 1))
    assert found.low == pytest.approx(wilson(1.0, freedom + 1, value)[0], rel=1e-3)


def people(rng, count, answers, spread):
    """Yield the answers of participants with Beta-distributed preferences, 0.7 on average."""
    for _ in range(count):
        preference = rng.betavariate(0.7 / spread, 0.3 / spread)
        yield [float(rng.random() < preference) for _ in range(answers + rng.randrange(5))]


def test_design_effect_matches_a_bootstrap_over_participants():
    given = list(people(random.Random(1), 60, 12, 0.5))
    wins, counts = np.array([sum(answers) for answers in given]), np.array([len(answers) for answers in given])
    options = {"paired": True, "n_resamples": 4000, "rng": 0, "method": "basic"}
    found = stats.bootstrap((wins, counts), lambda w, n, axis: w.sum(axis) / n.sum(axis), **options)
    rate = wins.sum() / counts.sum()
    expected = found.standard_error**2 / (rate * (1 - rate) / counts.sum())
    assert expected > 3
    assert design_effect(given, rate) == pytest.approx(expected, rel=0.1)


def test_intervals_cover_the_true_rate_of_heterogeneous_participants():
    """Coverage is about 95 % with 12 participants; treating all answers as independent covers far less."""
    rng, held, naive, rounds = random.Random(0), 0, 0, 1500
    for _ in range(rounds):
        found = win_rate(list(people(rng, 12, 10, 0.4)))
        held += found.low <= 0.7 <= found.high
        low, high = wilson(found.rate, found.answers, 1.96)
        naive += low <= 0.7 <= high
    assert held / rounds > 0.93
    assert naive / rounds < 0.8


def test_one_answer_each_gives_wilson_with_t():
    answers = [[1.0]] * 30 + [[0.0]] * 10
    found = win_rate(answers)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 40 / found.design_effect, stats.t.ppf(0.975, 39)))
    assert found.design_effect == pytest.approx(40 / 39)


def test_repeated_answers_add_no_information():
    once = [[1.0]] * 30 + [[0.0]] * 10
    often = [given * 20 for given in once]
    found, expected = win_rate(often), win_rate(once)
    assert (found.rate, found.low, found.high) == pytest.approx((expected.rate, expected.low, expected.high))
    assert found.answers == 20 * expected.answers


def test_ties_count_half_and_swapped_sides_mirror():
    given = [[1.0, 0.5, 0.0], [1.0, 1.0], [0.5], []]
    found, mirrored = win_rate(given), win_rate([[1 - answer for answer in answers] for answers in given])
    assert found.rate == pytest.approx(4 / 6)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))
    assert found.participants == 3


def test_unanimous_answers_count_participants():
    found = win_rate([[1.0] * 50] * 6)
    assert (found.rate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(wilson(1.0, 6, stats.t.ppf(0.975, 5))[0])


def test_single_participant_has_no_information():
    assert (win_rate([[1.0, 0.0]]).low, win_rate([[1.0] * 9]).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no answers"):
        win_rate([[], []])
