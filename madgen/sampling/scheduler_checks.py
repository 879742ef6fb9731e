"""Check that a scheduler supports regions and pictures to start from, by its class and config. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from madgen.types import Region
from madgen.utils.errors import UserError


def check_start_scheduler(cls: type, config: Mapping[str, Any]) -> None:
    """Raise UserError for a scheduler that cannot start from a picture, in the middle of its schedule."""
    reason = None
    if not hasattr(cls, "add_noise"):
        reason = "cannot add noise to pictures"
    elif cls.__name__ == "LMSDiscreteScheduler":
        reason = "needs the predictions of steps that do not run"
    elif cls.__name__ == "PNDMScheduler" and not config.get("skip_prk_steps"):
        reason = "begins with Runge-Kutta steps, unless sampling.scheduler_options={skip_prk_steps: true}, and"
        reason += " cannot skip them"
    if reason is not None:
        raise UserError(
            f"sampling.scheduler={cls.__name__} {reason}, so sampling.init does not apply; use DDIMScheduler"
        )


def check_regions_scheduler(scheduler: type, regions: Iterable[Sequence[Region]], bootstrapping: int) -> None:
    """Raise UserError if regions are bootstrapped and the scheduler cannot add noise."""
    if bootstrapping and any_cut_out(regions) and not hasattr(scheduler, "add_noise"):
        raise UserError(
            f"sampling.scheduler={scheduler.__name__} cannot bootstrap regions; use for example "
            "DDIMScheduler, or set method.regions.bootstrapping=0"
        )


def any_cut_out(regions: Iterable[Sequence[Region]]) -> bool:
    """Return whether any region sees only a part of the canvas."""
    return any(part.is_cut_out for parts in regions for part in parts)
