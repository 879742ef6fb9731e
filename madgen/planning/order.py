"""The order in which shards are claimed: the longest first, so that no worker begins a long one near the end."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from madgen.dataset.plan import Plan
from madgen.types import Prompt

LOOK_AT = 4
"""Claims of others that a worker looks at before it claims a free shard: what the dead leave must not wait for the end.

A thousand workers find a dead one within a fraction of a shard's time, and nobody looks at a thousand claims.
"""


def shard_costs(plan: Plan, cost: Callable[[Prompt], float]) -> list[float]:
    """The cost of each shard, from that of one panorama of each prompt; looks at lines with own fields alone."""
    header, each = plan.prompts.header, plan.samples_per_prompt
    usual = header.defaults.prompt("", "")
    base = cost(usual) if (usual.height, usual.width) in header.totals.sizes else 0.0
    costs = [base * plan.samples_per_shard] * plan.shard_count
    costs[-1] = base * (plan.samples - (plan.shard_count - 1) * plan.samples_per_shard)
    for row in plan.prompts.rows_with_overrides():
        begin, more = row * each, cost(plan.prompts[row]) - base
        end = begin + each
        while more and begin < end:  # the samples of a prompt may lie in several shards
            shard = begin // plan.samples_per_shard
            stop = min(end, (shard + 1) * plan.samples_per_shard)
            costs[shard] += more * (stop - begin)
            begin = stop
    return costs


def claim_order(costs: list[float]) -> list[int]:
    """Indices of shards, the longest first; those of equal cost as they are numbered."""
    return sorted(range(len(costs)), key=lambda index: (-costs[index], index))


def makespan(costs: list[float], workers: int) -> float:
    """When the last of so many equal workers ends, each taking the longest shard that is left."""
    free = [0.0] * min(workers, len(costs))
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(free, free[0] + cost)
    return max(free, default=0.0)


def turned(order: list[int], by: int) -> list[int]:
    """As `order`, begun elsewhere: workers that start together do not all reach for the same shard."""
    by = by % len(order) if order else 0
    return order[by:] + order[:by]
