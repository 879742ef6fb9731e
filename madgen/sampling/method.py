"""How panoramas are made, in what the sampler needs of it: `method` of the job."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.backbones import Merging
from madgen.config.schema import MethodConfig, SyncConfig
from madgen.diffusion.sync_schedule import SyncSchedule
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Method:
    """What is done besides denoising views: see `method` of the job."""

    merging: Merging
    sync: SyncSchedule | None = None
    sync_network: str = SyncConfig.network
    bootstrapping: int | None = None

    def __post_init__(self) -> None:
        if self.bootstrapping is not None and self.bootstrapping < 0:
            raise UserError(f"region_bootstrapping must be >= 0 steps or None, got {self.bootstrapping}")

    def bootstrapped_steps(self, num_inference_steps: int) -> int:
        """Two fifths of the steps unless asked otherwise: the released code takes 20 of 50."""
        wanted = round(0.4 * num_inference_steps) if self.bootstrapping is None else self.bootstrapping
        return min(wanted, num_inference_steps)


def method_of(config: MethodConfig) -> Method:
    """What the job's keys say; the views are the geometry's."""
    mad, sync = config.mad, config.sync
    merging = Merging(mad.steps, tuple(mad.blocks), mad.cross_attention)
    schedule = SyncSchedule(sync.weight, sync.decay, sync.steps, sync.every) if sync.weight else None
    return Method(merging, schedule, sync.network, config.regions.bootstrapping)
