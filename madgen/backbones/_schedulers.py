"""Noise schedulers: which of diffusers' can step a canvas, and fresh ones with their timesteps set."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from madgen.diffusion.denoise import steps_of
from madgen.hub.model_configs import config_source, read_config
from madgen.utils.errors import UserError

EVALUATE_ONCE = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Known to take one evaluation a step: planning with these need not import diffusers."""

LOOK_FURTHER = 32
"""Numbers of steps beyond one that a scheduler does not have that are tried, to name one that it has."""


def scheduler_class(name: str) -> Any:
    """A diffusers scheduler by its class name; UserError if there is none."""
    import diffusers

    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    needed = vars(found).get("_backends", []) if found is not None else []
    if missing := [package for package in needed if find_spec(package) is None]:
        raise UserError(f"sampling.scheduler={name} needs packages that are not installed: {', '.join(missing)}")
    if found is None or "set_timesteps" not in dir(found):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")]
        close = [f"{name}Scheduler"] if f"{name}Scheduler" in known else difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "examples: DDIMScheduler, EulerDiscreteScheduler"
        raise UserError(f"sampling.scheduler={name!r} is no diffusers scheduler; {hint}")
    return found


def check_scheduler(scheduler: Any) -> None:
    """Refuses what cannot step a canvas, or draws noise that is not the sample's own."""
    name = type(scheduler).__name__
    steps = all(hasattr(scheduler, needed) for needed in ("init_noise_sigma", "scale_model_input", "timesteps", "step"))
    if not steps or _needed(scheduler.step) > 3 or "Inverse" in name:
        raise UserError(f"sampling.scheduler={name} does not step a canvas of noise; take one such as DDIMScheduler")
    if hasattr(scheduler, "noise_sampler"):
        raise UserError(f"sampling.scheduler={name} draws noise that does not follow the sample's seed; take another")


def _needed(step: Callable[..., Any]) -> int:
    """How many arguments `step` cannot do without: noise, timestep and latents, or more that a canvas does not have."""
    parameters = inspect.signature(step).parameters.values()
    return sum(each.default is each.empty and each.kind is not each.VAR_KEYWORD for each in parameters)


def own_scheduler(pretrained: str, revision: str | None = None, config: str | None = None) -> dict[str, Any] | None:
    """The config of a checkpoint's own scheduler; None if it cannot be had."""
    try:
        where = config_source(pretrained, revision, config)
        return read_config(where, revision, "scheduler/scheduler_config.json", "backbone.pretrained")
    except UserError:
        return None


def evaluated_steps(
    own: dict[str, Any] | None, name: str | None, num_inference_steps: int, original_inference_steps: int | None
) -> list[int]:
    """The step of each evaluation of the UNet, as in the loop, before anything is loaded.

    `own` as `own_scheduler` has it, `name` as the job. Where `own` is None only the order of `name` is known. Raises
    UserError as `new_scheduler` does.
    """
    theirs = None if own is None else own.get("_class_name")
    if own is None or theirs is None:
        order = 1 if name is None else scheduler_class(name).order
        return [step for step in range(num_inference_steps) for _ in range(order)]
    if (name or theirs) in EVALUATE_ONCE and theirs in EVALUATE_ONCE and original_inference_steps is None:
        _check_steps(num_inference_steps, own.get("num_train_timesteps", num_inference_steps))
        return list(range(num_inference_steps))
    made = scheduler_class(theirs).from_config(own)
    return steps_of(new_scheduler(made, name, num_inference_steps, original_inference_steps, "cpu"))


def _check_steps(asked: int, trained: int) -> None:
    if asked > trained:
        raise UserError(f"sampling.num_inference_steps={asked} is more than the {trained} of training")


def new_scheduler(
    own: Any, name: str | None, num_inference_steps: int, original_inference_steps: int | None, device: Any
) -> Any:
    """`own`, the checkpoint's, or the diffusers class `name` made from its config; timesteps set on `device`.

    Raises UserError for numbers of steps that the scheduler does not have.
    """
    wanted = type(own) if name is None else scheduler_class(name)
    try:
        scheduler = wanted.from_config(own.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"sampling.scheduler={name} does not fit this checkpoint: {error}") from error
    check_scheduler(scheduler)
    _check_steps(num_inference_steps, own.config.num_train_timesteps)
    options = {}
    if original_inference_steps is not None:
        options["original_inference_steps"] = original_inference_steps
        if "original_inference_steps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(
                f"sampling.original_inference_steps={original_inference_steps} is not known to "
                f"{wanted.__name__}; leave it null"
            )
    try:
        scheduler.set_timesteps(num_inference_steps, device=device, **options)
    except ValueError as error:
        raise UserError(_no_such_steps(scheduler, num_inference_steps, options, str(error))) from error
    return scheduler


def _no_such_steps(scheduler: Any, asked: int, options: dict[str, Any], why: str) -> str:
    """What is wrong with a number of steps: too few, where a few more do; else what the scheduler says."""
    most = min(asked + LOOK_FURTHER, scheduler.config.num_train_timesteps)
    for steps in range(asked + 1, most + 1):
        with contextlib.suppress(ValueError):
            scheduler.set_timesteps(steps, **options)
            return (
                f"sampling.num_inference_steps={asked} is not possible with {type(scheduler).__name__}; "
                f"the next number that is: {steps}"
            )
    return f"sampling.num_inference_steps={asked}: {why}"
