"""Simulate the order in which workers claim shards: `python benchmarks/claim_order.py [--workers 1000 ...]`.

Panoramas of 512x1024 to 512x5120 px cost what `madgen.planning.cost` estimates (Stable Diffusion 2, 50 steps, guidance,
overlapping views), at the paper's speed with 10 % noise. Some workers are stragglers at half the speed. Workers die at
random and come back, like requeued jobs; the panorama in progress is lost, and their shard is taken over, with its
complete panoramas, once the lease has expired. As in a real run, a worker checks a few claims of others before it
claims a free shard.

The lower bound distributes the total work over the live workers without gaps, each at its own speed.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass, field

import numpy as np

from madgen.dataset.shards.leases import LEASE_S
from madgen.diffusion.views import build_layout
from madgen.planning.cost import view_evaluations
from madgen.planning.order import LEASES_CHECKED, claim_order

WIDTHS = (1024, 2048, 3072, 4096, 5120)  # pixels at height 512, in equal numbers
SECONDS_PER_EVALUATION = 44.3 / 2100  # the paper's 512x3072 px with MAD on an RTX A5000
STRAGGLERS, STRAGGLER_SPEED = 0.03, 0.5
HOURS_BETWEEN_DEATHS = 50.0  # per worker
DOWN_S = 300.0


def panorama_seconds() -> np.ndarray:
    """Return the seconds of a panorama of each width on a worker of speed 1."""
    layouts = [build_layout("overlapping", 64, width // 8, 64, 16) for width in WIDTHS]
    passes = [(step, True) for step in range(50)]
    evaluations = [view_evaluations(layout, passes).total(1, 1, 1) for layout in layouts]
    return np.array(evaluations) * SECONDS_PER_EVALUATION


@dataclass
class Fleet:
    """Workers with their speeds and times of death."""

    workers: int
    rng: np.random.Generator
    speeds: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.speeds = np.where(self.rng.random(self.workers) < STRAGGLERS, STRAGGLER_SPEED, 1.0)

    def next_death(self) -> float:
        return float(self.rng.exponential(HOURS_BETWEEN_DEATHS * 3600))


def simulate(shards: list[np.ndarray], order: list[int], fleet: Fleet) -> tuple[float, float, int]:
    """Return makespan and lower bound in seconds, and the number of deaths; `shards` holds seconds per panorama."""
    waiting = list(reversed(order))
    left = dict(enumerate(shards))
    expiring: list[tuple[float, int]] = []  # (expiry of the lease, shard) of dead workers
    free = [(0.0, worker) for worker in range(fleet.workers)]
    dies = [fleet.next_death() for _ in range(fleet.workers)]
    deaths: list[tuple[float, int]] = []  # (time, worker), for the lower bound
    idle: list[tuple[float, int]] = []
    ended = 0.0
    while left:
        now, worker = heapq.heappop(free)
        if now >= dies[worker]:  # while idle
            deaths.append((dies[worker], worker))
            back = dies[worker] + DOWN_S
            dies[worker] = back + fleet.next_death()
            heapq.heappush(free, (max(now, back), worker))
            continue
        over = sum(when <= now for when, _ in expiring)
        if over and fleet.rng.random() < 1 - (1 - over / fleet.workers) ** LEASES_CHECKED:
            _, index = heapq.heappop(expiring)
        elif waiting:
            index = waiting.pop()
        elif expiring:
            over, index = heapq.heappop(expiring)
            if over > now:
                heapq.heappush(expiring, (over, index))
                heapq.heappush(free, (over, worker))
                continue
        else:
            idle.append((now, worker))  # until another worker dies
            continue
        ends = now + np.cumsum(left[index]) / fleet.speeds[worker]
        if ends[-1] <= dies[worker]:
            del left[index]
            ended = max(ended, float(ends[-1]))
            heapq.heappush(free, (float(ends[-1]), worker))
            continue
        complete = int(np.searchsorted(ends, dies[worker], side="right"))
        left[index] = left[index][complete:]
        heapq.heappush(expiring, (dies[worker] + LEASE_S, index))
        heapq.heappush(free, (dies[worker], worker))
        if idle:
            since, other = idle.pop()
            heapq.heappush(free, (max(since, dies[worker] + LEASE_S), other))
    return ended, bound(sum(float(part.sum()) for part in shards), fleet.speeds, deaths), len(deaths)


def bound(work: float, speeds: np.ndarray, deaths: list[tuple[float, int]]) -> float:
    """Return when workers that are never idle finish `work`, each down for a while after each death."""
    total_speed = float(speeds.sum())
    until = work / total_speed
    for _ in range(50):
        lost = sum(speeds[worker] * min(DOWN_S, max(0.0, until - begin)) for begin, worker in deaths)
        until = (work + lost) / total_speed
    return until


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--panoramas", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples-per-shard", type=int, nargs="+", default=[128, 64, 32, 16, 8])
    options = parser.parse_args()
    each = panorama_seconds()
    print(f"{options.panoramas:,} panoramas of {each.min():.0f} to {each.max():.0f} s, {options.workers:,} workers; "
          f"makespan / lower bound, worst of {options.seeds} runs\n")  # fmt: skip
    print("| prompts | samples_per_shard | minutes per shard | shards per worker | lower bound, h | deaths ", end="")
    print("| as numbered | longest first |")
    print("|---|---|---|---|---|---|---|---|")
    for sizes in ("mixed", "small first"):
        for per_shard in options.samples_per_shard:
            print(row(sizes, per_shard, options.panoramas, options.workers, options.seeds, each), flush=True)


def row(sizes: str, per_shard: int, panoramas: int, workers: int, seeds: int, each: np.ndarray) -> str:
    """Return one row of the table."""
    worst, bounds, deaths = {"numbered": 0.0, "longest": 0.0}, 0.0, 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        planned = each[rng.integers(len(each), size=panoramas)]
        if sizes != "mixed":
            planned.sort()
        parts = range(0, panoramas, per_shard)
        took = planned * rng.lognormal(0.0, 0.1, panoramas)
        shards = [took[begin : begin + per_shard] for begin in parts]
        costs = [float(planned[begin : begin + per_shard].sum()) for begin in parts]
        for name, order in (("numbered", list(range(len(shards)))), ("longest", claim_order(costs))):
            makespan, least, deaths = simulate(shards, order, Fleet(workers, np.random.default_rng(seed)))
            worst[name], bounds = max(worst[name], makespan / least), least
    minutes = per_shard * each.mean() / 60
    return (
        f"| {sizes} | {per_shard} | {minutes:.0f} | {len(shards) / workers:.0f} | {bounds / 3600:.1f} | {deaths} "
        f"| {worst['numbered']:.3f} | {worst['longest']:.3f} |"
    )


if __name__ == "__main__":
    main()
