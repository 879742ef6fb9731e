"""Intervals of win rates against scipy, published values, and by how often they hold the truth."""

import random

import numpy as np
import pytest

from madgen.user_study.intervals import design_effect, rate_of, t_quantile, wilson


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_published_it(wins, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(wins / count, count, 1.959964) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (5, 5), (3, 7), (60, 100), (999, 1000)])
def test_wilson_as_scipy_has_it(wins, count):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(wins, count).proportion_ci(0.95, "wilson")
    assert wilson(wins / count, count, stats.norm.ppf(0.975)) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (120, 1.980)])
def test_t_as_tables_have_it(freedom, value):
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("probability", [0.9, 0.975, 0.9995])
def test_t_as_scipy_has_it(probability):
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 6, 9, 30, 138, 1001):
        assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


def people(rng, count, answers, spread):
    """Participants of whom each has a leaning of their own, 0.7 on average: Beta-binomial."""
    for _ in range(count):
        leaning = rng.betavariate(0.7 / spread, 0.3 / spread)
        yield [float(rng.random() < leaning) for _ in range(answers + rng.randrange(5))]


def test_the_design_effect_is_that_of_a_bootstrap_over_participants():
    stats = pytest.importorskip("scipy.stats")
    given = list(people(random.Random(1), 60, 12, 0.5))
    wins, counts = np.array([sum(answers) for answers in given]), np.array([len(answers) for answers in given])
    options = {"paired": True, "n_resamples": 4000, "rng": 0, "method": "basic"}
    found = stats.bootstrap((wins, counts), lambda w, n, axis: w.sum(axis) / n.sum(axis), **options)
    rate = wins.sum() / counts.sum()
    expected = found.standard_error**2 / (rate * (1 - rate) / counts.sum())
    assert expected > 3
    assert design_effect(given, rate) == pytest.approx(expected, rel=0.1)


def test_intervals_hold_the_truth_where_people_differ():
    """95 of 100 times, with 12 participants; Wilson's interval of all answers, as if independent, far less often."""
    rng, held, naive, rounds = random.Random(0), 0, 0, 1500
    for _ in range(rounds):
        found = rate_of(list(people(rng, 12, 10, 0.4)))
        held += found.low <= 0.7 <= found.high
        low, high = wilson(found.rate, found.answers, 1.96)
        naive += low <= 0.7 <= high
    assert held / rounds > 0.93
    assert naive / rounds < 0.8


def test_one_answer_each_is_wilson_with_t():
    answers = [[1.0]] * 30 + [[0.0]] * 10
    found = rate_of(answers)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 40 / found.design_effect, t_quantile(0.975, 39)))
    assert found.design_effect == pytest.approx(40 / 39)


def test_repeating_what_one_said_adds_nothing():
    once = [[1.0]] * 30 + [[0.0]] * 10
    often = [given * 20 for given in once]
    found, expected = rate_of(often), rate_of(once)
    assert (found.rate, found.low, found.high) == pytest.approx((expected.rate, expected.low, expected.high))
    assert found.answers == 20 * expected.answers


def test_ties_count_half_and_sides_mirror():
    given = [[1.0, 0.5, 0.0], [1.0, 1.0], [0.5], []]
    found, mirrored = rate_of(given), rate_of([[1 - answer for answer in answers] for answers in given])
    assert found.rate == pytest.approx(4 / 6)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))
    assert found.participants == 3


def test_where_all_agree_participants_count_not_answers():
    found = rate_of([[1.0] * 50] * 6)
    assert (found.rate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(wilson(1.0, 6, t_quantile(0.975, 5))[0])


def test_one_participant_says_nothing_of_others():
    assert (rate_of([[1.0, 0.0]]).low, rate_of([[1.0] * 9]).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no answers"):
        rate_of([[], []])
