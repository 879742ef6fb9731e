"""How sure a win rate is, where each participant gave several answers.

One person's answers are alike, so 20 people with 30 answers each are not 600 independent answers. The number of answers
is divided by their design effect, the variance of the rate between participants over that of independent answers (at
least 1), and Wilson's score interval is taken of what is left, with Student's t for the number of participants. Unlike
a bootstrap over participants it has no random numbers, and does not collapse to a point where everybody agrees.
Wilson (1927); the effective sample size and t are Korn and Graubard's (1998), who use them with Clopper and Pearson's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A share of answers."""

    rate: float
    """0..1."""
    low: float
    high: float
    answers: int
    participants: int
    design_effect: float
    """By how much the answers are fewer than they look."""


def rate_of(answers: Sequence[Sequence[float]]) -> Rate:
    """The mean of all answers (0, 1, or 0.5 for a tie), by participant, with its interval.

    One participant alone says nothing of others: 0 to 1. ValueError without any answer.
    """
    answers = [given for given in answers if given]
    people, count = len(answers), sum(map(len, answers))
    if not count:
        raise ValueError("no answers")
    rate = sum(map(sum, answers)) / count
    effect = design_effect(answers, rate)
    low, high = wilson(rate, count / effect, t_quantile((1 + CONFIDENCE) / 2, people - 1)) if people > 1 else (0.0, 1.0)
    return Rate(rate, low, high, count, people, effect)


def design_effect(answers: Sequence[Sequence[float]], rate: float) -> float:
    """Variance of the rate over that of independent answers, from what participants' totals differ by; at least 1."""
    people, count = len(answers), sum(map(len, answers))
    independent = rate * (1 - rate) / count
    if people < 2 or independent == 0:
        return count / people  # nothing to tell it from: each participant counts as one answer
    squares = sum((sum(given) - rate * len(given)) ** 2 for given in answers)
    return max(1.0, people / (people - 1) * squares / count**2 / independent)


def wilson(rate: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a rate of `count` answers; `quantile` 1.96 for 95 % and many participants."""
    square = quantile**2
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = quantile / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's t with so many degrees of freedom, by bisection; `probability` 0.5..1."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """Probability that Student's t lies in -t..t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square, odd = math.cos(angle) ** 2, freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for index in range(2 + odd, freedom - 1, 2):
        term *= square * (index - 1) / index
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
