"""The order in which shards are leased: longest first, so that no worker starts a long one near the end."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from madgen.dataset.plan import Plan, Stage
from madgen.types import Prompt

LEASES_CHECKED = 4
"""Leases of other workers that are checked before a free shard is taken, so that shards of dead workers do not wait
for the end: many workers find a dead one soon, and no worker checks a thousand leases."""


def shard_costs(plan: Plan, cost: Callable[[Prompt], float]) -> list[float]:
    """Sum up the cost of each shard from the cost of one panorama; reads only the prompts with fields of their own."""
    header = plan.prompts.header
    usual = header.defaults.prompt("", "")
    base = cost(usual) if (usual.height, usual.width) in header.totals.sizes else 0.0
    costs: list[float] = []
    more = [(row, extra) for row in plan.prompts.rows_with_overrides() if (extra := cost(plan.prompts[row]) - base)]
    for stage in plan.stages:
        own = [base * plan.samples_per_shard] * -(-len(stage) // plan.samples_per_shard)
        own[-1] = base * (len(stage) - (len(own) - 1) * plan.samples_per_shard)
        for begin, end, extra in _spans(stage, more):
            while begin < end:  # the samples of a prompt may lie in several shards
                shard = begin // plan.samples_per_shard
                stop = min(end, (shard + 1) * plan.samples_per_shard)
                own[shard] += extra * (stop - begin)
                begin = stop
        costs += own
    return costs


def _spans(stage: Stage, rows: list[tuple[int, float]]) -> Iterator[tuple[int, int, float]]:
    """Yield the positions (begin, end) of the samples of some rows in a generation, each with the row's value."""
    start = 0
    for part in stage.parts:
        for row, value in rows:
            if (place := part.place(row)) is not None:
                yield start + place * part.each, start + (place + 1) * part.each, value
        start += len(part)


def claim_order(costs: list[float]) -> list[int]:
    """Return the indices of the shards, longest first; shards of equal cost keep their order."""
    return sorted(range(len(costs)), key=lambda index: (-costs[index], index))


def makespan(costs: list[float], workers: int) -> float:
    """Return when the last worker finishes if each takes the longest remaining shard."""
    free = [0.0] * min(workers, len(costs))
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(free, free[0] + cost)
    return max(free, default=0.0)


def rotated(order: list[int], by: int) -> list[int]:
    """Rotate an order, so that workers that start together do not all try the same shard first."""
    by = by % len(order) if order else 0
    return order[by:] + order[:by]
