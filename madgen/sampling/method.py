"""The settings of `method` that the sampler uses."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.config.schema import MethodConfig, SyncConfig
from madgen.diffusion.attention import Merging
from madgen.diffusion.sync_schedule import SyncSchedule
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Method:
    """Merged attention, SyncDiffusion and bootstrapping of regions; see `method` of the job."""

    merging: Merging
    sync: SyncSchedule | None = None
    sync_network: str = SyncConfig.network
    bootstrapping: int | None = None

    def __post_init__(self) -> None:
        if self.bootstrapping is not None and self.bootstrapping < 0:
            raise UserError(f"region_bootstrapping must be >= 0 steps or None, got {self.bootstrapping}")

    @classmethod
    def from_config(cls, config: MethodConfig) -> Method:
        """Convert the keys of a job; the views are part of `Geometry`."""
        mad, sync = config.mad, config.sync
        merging = Merging(mad.steps, tuple(mad.blocks), mad.cross_attention)
        schedule = SyncSchedule(sync.weight, sync.decay, sync.steps, sync.every) if sync.weight else None
        return cls(merging, schedule, sync.network, config.regions.bootstrapping)

    def bootstrapped_steps(self, num_inference_steps: int) -> int:
        """Return the number of bootstrapped steps; default: two fifths, like the released code (20 of 50)."""
        steps = round(0.4 * num_inference_steps) if self.bootstrapping is None else self.bootstrapping
        return min(steps, num_inference_steps)
