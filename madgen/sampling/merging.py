"""Build the merge operator of a method, and check that a scheduler supports it."""

from __future__ import annotations

from typing import Any

from madgen.backbones._schedulers import example_for
from madgen.diffusion.operators import MergeOperator
from madgen.diffusion.reference import ReferenceSwap, check_history
from madgen.sampling.method import Method
from madgen.utils.errors import UserError


def merger_of(method: Method) -> MergeOperator:
    """Return how predictions are merged, in the steps in which attention is not."""
    merge = method.config.merge
    options = merge.operator, merge.weights, merge.width, method.merging.steps
    return ReferenceSwap(*options, merge.reference_steps) if merge.reference_steps else MergeOperator(*options)


def check_merge_scheduler(method: Method, scheduler: Any) -> None:
    """Raise UserError if the merge does not support a scheduler."""
    name, merge = type(scheduler).__name__, method.config.merge
    if merge.operator == "swap" and getattr(scheduler.config, "thresholding", False):
        raise UserError(
            f"method.merge.operator=swap needs cells that step independently, but {name} with thresholding=true "
            "clips by a quantile of the whole canvas; set thresholding=false"
        )
    if merge.reference_steps:
        try:
            check_history(scheduler)
        except ValueError as error:
            raise UserError(
                f"method.merge.reference_steps={merge.reference_steps} replaces latents between steps, but "
                f"{error}; use for example sampling.scheduler={example_for(scheduler)}"
            ) from error
