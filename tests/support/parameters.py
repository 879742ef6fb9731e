"""Parameters of tests: all combinations of some values, most of them in the slow tier."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def combinations(*axes: Sequence[Any], one_in: int, name: Callable[[Any], str] = str) -> list[Any]:
    """Return all combinations of one value per axis. One in `one_in` is in the default tier, with every value once."""
    default, parameters = set(), []
    for indices in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[index] for axis, index in zip(axes, indices, strict=True)]
        slow = sum(indices) % one_in > 0
        default |= set() if slow else set(enumerate(indices))
        marks = [pytest.mark.slow] if slow else []
        parameters.append(pytest.param(*values, marks=marks, id="-".join(map(name, values))))
    assert len(default) == sum(map(len, axes)), f"one_in={one_in} leaves a value to the slow tier"
    return parameters
