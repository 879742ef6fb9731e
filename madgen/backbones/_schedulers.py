"""diffusers schedulers: check that they can step a canvas, and create them with their timesteps set."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from madgen.backbones._flow import (
    FlowSchedule,
    adapted,
    flow_scheduler,
    is_flow_class,
    is_flow_config,
    supports_flow,
)
from madgen.diffusion.denoise import steps_of
from madgen.hub.model_configs import config_source, read_config
from madgen.utils.errors import UserError

EVALUATE_ONCE = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers with one evaluation per step; planning with them does not import diffusers."""
FLOW_EVALUATE_ONCE = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
"""The same for flow matching."""

MAX_STEP_SUGGESTIONS = 32
"""Numbers of steps to try beyond an impossible one, to suggest a possible one."""


def scheduler_class(name: str) -> Any:
    """Return a diffusers scheduler class by its name; UserError if it is unknown."""
    import diffusers

    scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    needed = vars(scheduler).get("_backends", []) if scheduler is not None else []
    if missing := [package for package in needed if find_spec(package) is None]:
        raise UserError(f"sampling.scheduler={name} needs packages that are not installed: {', '.join(missing)}")
    if scheduler is None or "set_timesteps" not in dir(scheduler):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")]
        close = [f"{name}Scheduler"] if f"{name}Scheduler" in known else difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "examples: DDIMScheduler, EulerDiscreteScheduler"
        raise UserError(f"sampling.scheduler={name!r} is not a diffusers scheduler; {hint}")
    return adapted(scheduler)


def check_scheduler(scheduler: Any) -> None:
    """Raise UserError if a scheduler cannot step a canvas, or draws noise independently of the sample's seed."""
    name = type(scheduler).__name__
    steps = all(hasattr(scheduler, needed) for needed in ("init_noise_sigma", "scale_model_input", "timesteps", "step"))
    if not steps or _needed(scheduler.step) > 3 or "Inverse" in name:
        raise UserError(f"sampling.scheduler={name} cannot step a canvas of noise; use for example DDIMScheduler")
    if hasattr(scheduler, "noise_sampler"):
        raise UserError(f"sampling.scheduler={name} draws noise independently of the sample's seed; use another one")


def _check_prediction(own: Any, cls: Any) -> None:
    """Raise UserError if one of a checkpoint's own scheduler and a class is for flow matching and the other is not."""
    if not is_flow_config(own.config, type(own).__name__) and is_flow_class(cls):
        raise UserError(
            f"sampling.scheduler={cls.__name__} cannot step this checkpoint, which predicts "
            f"{own.config.get('prediction_type', 'epsilon')}, not a flow; use for example DDIMScheduler"
        )
    if is_flow_config(own.config, type(own).__name__) and not supports_flow(cls):
        raise UserError(
            f"sampling.scheduler={cls.__name__} cannot step this checkpoint, which was trained with flow matching; use "
            "for example FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler"
        )


def _needed(step: Callable[..., Any]) -> int:
    """Count the required arguments of `step`: noise, timestep and latents, or others that a canvas cannot provide."""
    parameters = inspect.signature(step).parameters.values()
    return sum(each.default is each.empty and each.kind is not each.VAR_KEYWORD for each in parameters)


def own_scheduler(pretrained: str, revision: str | None = None, config: str | None = None) -> dict[str, Any] | None:
    """Read the config of a checkpoint's own scheduler; None if it is not available."""
    try:
        where = config_source(pretrained, revision, config)
        return read_config(where, revision, "scheduler/scheduler_config.json", "backbone.pretrained")
    except UserError:
        return None


def evaluated_steps(
    own: dict[str, Any] | None, name: str | None, num_inference_steps: int, original_inference_steps: int | None
) -> list[int]:
    """Return the denoising step of each evaluation of the UNet, without loading a model.

    `own` is the result of `own_scheduler`, `name` is `sampling.scheduler`. If `own` is None, only the order of `name`
    is known. Raises UserError like `new_scheduler`.
    """
    own_name = None if own is None else own.get("_class_name")
    if own is None or own_name is None:
        order = 1 if name is None else scheduler_class(name).order
        return [step for step in range(num_inference_steps) for _ in range(order)]
    simple = FLOW_EVALUATE_ONCE if own_name in FLOW_EVALUATE_ONCE else EVALUATE_ONCE
    if (name or own_name) in simple and own_name in simple and original_inference_steps is None:
        _check_steps(num_inference_steps, own.get("num_train_timesteps", num_inference_steps))
        return list(range(num_inference_steps))
    scheduler = scheduler_class(own_name).from_config(own)
    return steps_of(new_scheduler(scheduler, name, num_inference_steps, original_inference_steps, "cpu"))


def _check_steps(requested: int, trained: int) -> None:
    if requested > trained:
        raise UserError(f"sampling.num_inference_steps={requested} is more than the {trained} of training")


def new_scheduler(
    own: Any,
    name: str | None,
    num_inference_steps: int,
    original_inference_steps: int | None,
    device: Any,
    tokens: int = 4096,
    flow: FlowSchedule = FlowSchedule(),  # noqa: B008
) -> Any:
    """Create a scheduler like `own`, or of the class `name` with the config of `own`; timesteps set on `device`.

    `tokens` (of a view) and `flow` are for flow matching, see `flow_scheduler`. Raises UserError for numbers of steps
    that the scheduler does not support, and for schedulers that the checkpoint was not trained for.
    """
    cls = adapted(type(own)) if name is None else scheduler_class(name)
    _check_prediction(own, cls)
    options: dict[str, Any] = {}
    try:
        if is_flow_config(own.config, type(own).__name__):
            scheduler, options = flow_scheduler(cls, own.config, num_inference_steps, tokens, flow)
        else:
            scheduler = cls.from_config(own.config)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"sampling.scheduler={name} does not fit this checkpoint: {error}") from error
    check_scheduler(scheduler)
    _check_steps(num_inference_steps, own.config.num_train_timesteps)
    if original_inference_steps is not None:
        options["original_inference_steps"] = original_inference_steps
        if "original_inference_steps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(
                f"sampling.original_inference_steps={original_inference_steps} is not supported by "
                f"{cls.__name__}; set it to null"
            )
    try:
        scheduler.set_timesteps(num_inference_steps, device=device, **options)
    except ValueError as error:
        raise UserError(_no_such_steps(scheduler, num_inference_steps, options, str(error))) from error
    return scheduler


def _no_such_steps(scheduler: Any, requested: int, options: dict[str, Any], reason: str) -> str:
    """Return an error message that names the next possible number of steps, if there is one nearby."""
    last = min(requested + MAX_STEP_SUGGESTIONS, scheduler.config.num_train_timesteps)
    for steps in range(requested + 1, last + 1):
        with contextlib.suppress(ValueError):
            scheduler.set_timesteps(steps, **options)
            return (
                f"sampling.num_inference_steps={requested} is not possible with {type(scheduler).__name__}; "
                f"the next possible number is {steps}"
            )
    return f"sampling.num_inference_steps={requested}: {reason}"


def scheduler_object(scheduler: Any, own: Any) -> Any:
    """Return a scheduler that Python callers give: an object as it is, a class with the config of `own`."""
    if isinstance(scheduler, type) and hasattr(scheduler, "from_config"):
        return scheduler.from_config(own.config)
    if isinstance(scheduler, type) or not all(hasattr(scheduler, name) for name in ("config", "set_timesteps", "step")):
        raise UserError(
            "scheduler must be the name of a diffusers scheduler, a scheduler, or its class, "
            f"got {getattr(scheduler, '__name__', repr(scheduler))}"
        )
    return scheduler
