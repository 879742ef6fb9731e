"""Confidence intervals of win rates from several answers per participant.

The answers of one participant are correlated, so 20 participants with 30 answers each are not 600 independent answers.
The number of answers is divided by its design effect: the variance of the rate between participants over that of
independent answers, at least 1. Wilson's score interval (1927) of that effective sample size, with Student's t for the
number of participants (Korn and Graubard, 1998, for Clopper and Pearson's interval), is deterministic and, unlike a
bootstrap over participants, does not collapse to a point if all participants agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A win rate and its confidence interval, in 0..1."""

    rate: float
    low: float
    high: float
    answers: int
    participants: int
    design_effect: float
    """Number of answers over the effective number of independent answers."""


def win_rate(answers: Sequence[Sequence[float]]) -> Rate:
    """Return the mean of all answers (1, 0, or 0.5 for a tie), grouped by participant, with its interval.

    A single participant gives the interval 0 to 1. Raises ValueError without any answer.
    """
    from scipy.special import stdtrit

    answers = [given for given in answers if given]
    participants, count = len(answers), sum(map(len, answers))
    if not count:
        raise ValueError("no answers")
    rate = sum(map(sum, answers)) / count
    effect, low, high = design_effect(answers, rate), 0.0, 1.0
    if participants > 1:
        low, high = wilson(rate, count / effect, float(stdtrit(participants - 1, (1 + CONFIDENCE) / 2)))
    return Rate(rate, low, high, count, participants, effect)


def design_effect(answers: Sequence[Sequence[float]], rate: float) -> float:
    """Return the variance of the rate over that of independent answers, estimated between participants; at least 1."""
    participants, count = len(answers), sum(map(len, answers))
    independent = rate * (1 - rate) / count
    if participants < 2 or independent == 0:
        return count / participants  # no variance to estimate it from: each participant counts as one answer
    squares = sum((sum(given) - rate * len(given)) ** 2 for given in answers)
    return max(1.0, participants / (participants - 1) * squares / count**2 / independent)


def wilson(rate: float, count: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's score interval of `count` answers, not necessarily an integer; `quantile` 1.96 means 95 %."""
    square = quantile**2
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = quantile / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
