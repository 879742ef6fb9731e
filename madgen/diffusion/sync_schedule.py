"""Schedule of SyncDiffusion; independent of torch."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.utils.errors import UserError


@dataclass(frozen=True)
class SyncSchedule:
    """Gradient weight `weight * decay ** step` in every `every`-th of the first `steps` steps."""

    weight: float
    decay: float
    steps: int
    every: int

    def __post_init__(self) -> None:
        if not (0 <= self.weight < float("inf") and 0 < self.decay <= 1 and self.steps >= 0 and self.every >= 1):
            raise UserError(f"SyncDiffusion needs weight >= 0, decay in 0..1, steps >= 0 and every >= 1, got {self}")

    def at(self, step: int) -> float:
        """Return the gradient weight at a step, 0 for no update."""
        due = step < self.steps and (step + 1) % self.every == 0
        return self.weight * self.decay**step if due else 0.0
