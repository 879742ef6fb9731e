"""Denoising steps of a scheduler, some of which evaluate the network more than once."""

from __future__ import annotations

from typing import Any


def steps_of(scheduler: Any, first: int = 0) -> list[int]:
    """Return the step that each evaluation from `first` on belongs to, counted from 0.

    Schedulers of second order, such as Heun's, take two evaluations a step, and PNDM evaluates at some timesteps more
    than once.
    """
    if scheduler.order > 1:
        return [evaluation // scheduler.order for evaluation in range(len(scheduler.timesteps) - first)]
    times = scheduler.timesteps[first:].tolist()
    seen: dict[float, int] = {}
    return [seen.setdefault(time, len(seen)) for time in times]
