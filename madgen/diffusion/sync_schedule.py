"""When SyncDiffusion acts. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.utils.errors import UserError


@dataclass(frozen=True)
class SyncSchedule:
    """When and how strongly: `weight * decay ** step`, in the first `steps` steps, at each `every`-th of them."""

    weight: float
    decay: float
    steps: int
    every: int

    def __post_init__(self) -> None:
        if not (0 <= self.weight < float("inf") and 0 < self.decay <= 1 and self.steps >= 0 and self.every >= 1):
            raise UserError(f"SyncDiffusion needs weight >= 0, decay in 0..1, steps >= 0 and every >= 1, got {self}")

    def at(self, step: int) -> float:
        """The gradient's weight at a step; 0 where there is none."""
        due = step < self.steps and (step + 1) % self.every == 0
        return self.weight * self.decay**step if due else 0.0
