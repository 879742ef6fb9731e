"""diffusers schedulers: check that they can step a canvas, and create them with their timesteps set."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from madgen.backbones import SchedulerSettings
from madgen.backbones._flow import FlowSchedule, adapted, flow_scheduler, is_flow_class, is_flow_config, supports_flow
from madgen.diffusion.steps import steps_of
from madgen.hub.model_configs import FILES, config_source, read_config
from madgen.hub.prediction_marks import scheduler_of_file
from madgen.hub.weights import LOADING_FAILURES, ModelFiles, single_file
from madgen.utils.errors import UserError

EVALUATE_ONCE = {"DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
"""Schedulers with one evaluation per step; planning with them does not import diffusers."""

FLOW_EVALUATE_ONCE = {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"}
"""The same for flow matching."""

MAX_STEP_SUGGESTIONS = 32
"""Numbers of steps to try above and below an impossible one, to suggest a possible one."""

FLOW = "flow_prediction"
PIPELINE_DEFAULTS = {"StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False}}
"""Values that diffusers' pipelines assume for keys that a scheduler's config lacks."""

MEANINGFUL = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
"""Keys that say how a model was trained, with the value of schedulers that do not have the key."""

Options = Mapping[str, Any]
FAILURES = (*LOADING_FAILURES, ArithmeticError, AssertionError, ImportError)
"""What diffusers' schedulers raise for settings that they do not support."""


EXAMPLES = {False: "DDIMScheduler", True: "FlowMatchEulerDiscreteScheduler"}
"""Schedulers of backbones that predict noise, and of flow-matching ones, which every checkpoint supports."""


def example_for(scheduler: Any) -> str:
    """Return a scheduler to use instead of another one, on the same backbone."""
    return EXAMPLES[is_flow_config(scheduler.config, type(scheduler).__name__)]


def scheduler_class(name: str, flow: bool = False) -> Any:
    """Return a diffusers scheduler class by its name; UserError if it is unknown.

    `flow`: the backbone is a flow-matching model, for the classes that errors propose.
    """
    import diffusers

    scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    needed = vars(scheduler).get("_backends", []) if scheduler is not None else []
    if missing := [package for package in needed if find_spec(package) is None]:
        raise UserError(f"sampling.scheduler={name} needs packages that are not installed: {', '.join(missing)}")
    if scheduler is None or "set_timesteps" not in dir(scheduler):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler") and not each.startswith("Flax")]
        near = [f"{name}Scheduler", *difflib.get_close_matches(name, known, n=5)]
        close = next((each for each in near if each in known and _is_for(getattr(diffusers, each), flow)), None)
        hint = f"use for example {EXAMPLES[flow]}" if close is None else f"did you mean {close}?"
        raise UserError(f"sampling.scheduler={name!r} is not a diffusers scheduler; {hint}")
    return adapted(scheduler)


def _is_for(cls: Any, flow: bool) -> bool:
    """Return whether a class fits a backbone: one of flow matching (`flow`), or one that predicts noise."""
    return supports_flow(cls) if flow else not is_flow_class(cls)


def check_scheduler(scheduler: Any) -> None:
    """Raise UserError if a scheduler cannot step a canvas, or draws noise independently of the sample's seed."""
    name = type(scheduler).__name__
    steps = all(hasattr(scheduler, needed) for needed in ("init_noise_sigma", "scale_model_input", "timesteps", "step"))
    if not steps or _needed(scheduler.step) > 3 or "Inverse" in name:
        raise UserError(
            f"sampling.scheduler={name} cannot step a canvas of noise; use for example {example_for(scheduler)}"
        )
    if hasattr(scheduler, "noise_sampler"):
        raise UserError(f"sampling.scheduler={name} draws noise independently of the sample's seed; use another one")


def _needed(step: Callable[..., Any]) -> int:
    """Count the required arguments of `step`: noise, timestep and latents, or others that a canvas cannot provide."""
    parameters = inspect.signature(step).parameters.values()
    return sum(each.default is each.empty and each.kind is not each.VAR_KEYWORD for each in parameters)


def own_scheduler(files: ModelFiles, prediction_type: str | None = None) -> dict[str, Any] | None:
    """Read the config of a checkpoint's own scheduler; None if it is not available.

    Keys in the file are used as they are. Others have the values that the checkpoint's pipeline has in diffusers.
    `prediction_type` replaces that of the config. Raises UserError for a single file whose marks contradict the config.
    """
    try:
        where = config_source(files)
        model = read_config(where, files.revision, FILES[0], "backbone.pretrained")
        own = read_config(where, files.revision, "scheduler/scheduler_config.json", "backbone.pretrained")
    except UserError:
        return None
    entry = model.get("scheduler")
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        own = {**own, "_class_name": entry[1]}
    own = {**PIPELINE_DEFAULTS.get(model.get("_class_name", ""), {}), **own}
    if prediction_type is not None and is_flow_config(own, own.get("_class_name", "")):
        raise UserError(
            f"backbone.prediction_type={prediction_type} does not apply: flow-matching models predict a velocity"
        )
    if (file := single_file(files.pretrained)) is not None:
        return scheduler_of_file(file, own, files.config, prediction_type)
    return own if prediction_type is None else {**own, "prediction_type": prediction_type}


def evaluated_steps(own: dict[str, Any] | None, settings: SchedulerSettings, flow: bool) -> list[int]:
    """Return the denoising step of each evaluation of the network, without loading a model.

    `own` is the result of `own_scheduler`; if it is None, only the order of `settings.scheduler` is known. `flow`: the
    backbone is a flow-matching model. Raises UserError like `new_scheduler`.
    """
    own_name, name, steps = (own or {}).get("_class_name"), settings.scheduler, settings.num_inference_steps
    if own is None or own_name is None:
        if name is None:
            return list(range(steps))
        cls = scheduler_class(name, flow)
        check_options(cls, settings.scheduler_options)
        return [step for step in range(steps) for _ in range(cls.order)]
    usual = settings.original_inference_steps is None and not settings.scheduler_options
    if usual and _is_plain(own, {own_name, name or own_name}, steps, flow):
        return list(range(steps))
    scheduler = build_scheduler(scheduler_class(own_name), own, {})
    return steps_of(new_scheduler(scheduler, settings, "cpu", schedule=FlowSchedule() if flow else None))


def _is_plain(own: Mapping[str, Any], names: set[str], steps: int, flow: bool) -> bool:
    """Return whether common schedulers with a common config certainly support this number of steps."""
    trained, offset = own.get("num_train_timesteps", 1000), own.get("steps_offset", 0)
    if flow:
        return (
            names <= FLOW_EVALUATE_ONCE
            and steps <= trained
            and not own.get("shift_terminal")
            and not any(own.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
        )
    if not all(type(number) is int and number >= 0 for number in (trained, offset)) or 2 * steps > trained:
        return False
    return (
        names <= EVALUATE_ONCE
        and own.get("prediction_type", "epsilon") in ("epsilon", "v_prediction", "sample")
        and own.get("beta_schedule", "linear") in ("linear", "scaled_linear")
        and offset <= trained // steps
        and own.get("timestep_spacing", "leading") in ("leading", "linspace", "trailing")
        and math.ceil(trained / (trained / steps)) == steps  # what trailing timesteps count to
        and not any(own.get(key) for key in ("trained_betas", "thresholding", "rescale_betas_zero_snr"))
        and not any(value for key, value in own.items() if key.startswith("use_"))
    )


def build_scheduler(cls: Any, own: Mapping[str, Any], options: Options) -> Any:
    """Create a scheduler from a config and options of `sampling.scheduler_options`; UserError if they do not fit."""
    check_options(cls, options)
    try:
        scheduler = cls.from_config({key: value for key, value in own.items() if key not in options}, **options)
    except FAILURES as error:
        given = f" with sampling.scheduler_options={dict(options)}" if options else ""
        raise UserError(
            f"sampling.scheduler={cls.__name__}{given} does not fit this checkpoint: {_first_line(error)}"
        ) from error
    for key, default in MEANINGFUL.items():
        value = scheduler.config.get(key, default)
        if value != default and key not in inspect.signature(cls).parameters:
            raise UserError(
                f"sampling.scheduler={cls.__name__} does not support {key}={value} of this checkpoint; "
                "use for example DDIMScheduler"
            )
    return scheduler


def _config_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's config; a value that was set later, such as by a pipeline, does not count as a default."""
    parameters, config = inspect.signature(type(scheduler)).parameters, dict(scheduler.config)
    defaults = [
        key
        for key in config.get("_use_default_values", ())
        if key in parameters and parameters[key].default == config.get(key)
    ]
    return {**config, "_use_default_values": defaults}


def check_options(cls: Any, options: Options) -> None:
    """Raise UserError for options that a scheduler class does not have, or of another type."""
    hints = get_type_hints(cls.__init__)
    known = [name for name in inspect.signature(cls).parameters if name != "kwargs"]
    for key, value in options.items():
        where = f"sampling.scheduler_options.{key}"
        if key == "prediction_type" and value != FLOW:
            raise UserError(f"{where}={value}: set backbone.prediction_type instead")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise UserError(f"{where}: {cls.__name__} has no such argument; {hint}")
        if key in hints and not _is_instance(value, hints[key]):
            raise UserError(f"{where} of {cls.__name__} must be {_type_name(hints[key])}, got {value!r}")


def _is_instance(value: Any, hint: Any) -> bool:
    """Return whether a value of a job is of an annotated type, as far as YAML has such a type."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is_instance(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in (bool, int, str, NoneType):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, Sequence) and not isinstance(value, str)


def _type_name(hint: Any) -> str:
    names = {NoneType: "null", bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_name(each) for each in get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return names.get(hint, "a list")


def check_prediction(cls: Any, config: Mapping[str, Any], flow: bool) -> None:
    """Raise UserError if a scheduler is one of flow matching and the backbone (`flow`) is not, or the other way."""
    name = cls.__name__
    if is_flow_config(config, name) and not flow:
        raise UserError(
            f"sampling.scheduler={name} cannot sample this backbone: it is configured for flow matching, and the "
            "backbone predicts noise; use for example DDIMScheduler without flow options"
        )
    if flow and not is_flow_config(config, name):
        raise UserError(
            f"sampling.scheduler={name} cannot step this backbone, which is a flow-matching model; use for example "
            "FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler"
        )


def _flow_scheduler(
    cls: Any, own: Any, steps: int, tokens: int, schedule: FlowSchedule, options: Options
) -> tuple[Any, dict[str, Any]]:
    """Create a scheduler of flow matching with options of the job; see `flow_scheduler`."""
    if not supports_flow(cls):
        check_prediction(cls, {}, flow=True)
    check_options(cls, options)
    config = _config_of(own)
    defaults = [key for key in config["_use_default_values"] if key not in options]
    config |= {**options, "_use_default_values": defaults}
    if "flow_shift" in options:
        config |= {"shift": options["flow_shift"], "use_dynamic_shifting": False}
    try:
        scheduler, arguments = flow_scheduler(cls, config, steps, tokens, schedule)
    except UserError:
        raise
    except FAILURES as error:
        name = f"sampling.scheduler={cls.__name__}"
        raise UserError(f"{name} does not fit this checkpoint: {_first_line(error)}") from error
    for key, value in options.items():
        if (used := scheduler.config.get(key)) != value:
            raise UserError(
                f"sampling.scheduler_options.{key}={value} does not apply to this flow-matching backbone, which needs "
                f"{used}; remove it"
            )
    return scheduler, arguments


def new_scheduler(
    own: Any, settings: SchedulerSettings, device: Any, tokens: int = 4096, schedule: FlowSchedule | None = None
) -> Any:
    """Create a scheduler like `own`, or of the class that `settings` name with the config of `own`.

    Its timesteps are set on `device`. `schedule`: the backbone is a flow-matching model, with `tokens` in a view; None:
    it predicts noise. Raises UserError for settings that the scheduler does not support, for schedulers that the
    checkpoint was not trained for, and for numbers of steps with which it fails in the course of sampling.
    """
    steps, options = settings.num_inference_steps, settings.scheduler_options
    original, name = settings.original_inference_steps, settings.scheduler
    cls = adapted(own.__class__) if name is None else scheduler_class(name, schedule is not None)
    arguments: dict[str, Any] = {}
    check_prediction(type(own), own.config, schedule is not None)
    if schedule is None:
        scheduler = build_scheduler(cls, _config_of(own), options)
        check_prediction(cls, scheduler.config, flow=False)
    else:
        scheduler, arguments = _flow_scheduler(cls, own, steps, tokens, schedule, options)
    check_scheduler(scheduler)
    if steps > (trained := scheduler.config.get("num_train_timesteps", steps)):
        raise UserError(f"sampling.num_inference_steps={steps} is more than the {trained} of training, the maximum")
    if original is not None:
        arguments["original_inference_steps"] = original
        if "original_inference_steps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(
                f"sampling.original_inference_steps={original} is not supported by {cls.__name__}; set it to null"
            )
    plain = original is None and _is_plain(scheduler.config, {cls.__name__}, steps, schedule is not None)
    if not plain and (reason := _failure(scheduler, steps, arguments)) is not None:
        raise UserError(_no_such_steps(scheduler, steps, arguments, reason))
    scheduler.set_timesteps(steps, device=device, **arguments)
    return scheduler


def _failure(scheduler: Any, steps: int, arguments: dict[str, Any]) -> str | None:
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if "sigmas" in arguments and len(arguments["sigmas"]) != steps:
        arguments = {**arguments, "sigmas": [1 - step / steps for step in range(steps)]}
    content, given = (
        json.dumps(each, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        for each in (config, arguments)
    )
    return _trial(type(scheduler), content, steps, given)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _trial(cls: Any, config: str, steps: int, arguments: str) -> str | None:
    """Step a canvas of one cell through the whole schedule; return why that fails, None if it does not."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    try:
        scheduler = cls.from_config(json.loads(config))
        with np.errstate(all="ignore"):  # values that are not finite are found below
            scheduler.set_timesteps(steps, device="cpu", **json.loads(arguments))
        first, last = (float(timestep) for timestep in (scheduler.timesteps.max(), scheduler.timesteps.min()))
        discrete = hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas")
        trained = scheduler.config.num_train_timesteps - 1 if discrete else None
        if trained is not None and not 0 <= last <= first <= trained:
            return f"its timesteps reach from {first:g} to {last:g}, but those of training from {trained} to 0"
        latents = torch.randn((1, 4, 1, 1), generator=generator, dtype=torch.float32) * scheduler.init_noise_sigma
        draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(latents, timestep)
            noise = torch.randn((1, 4, 1, 1), generator=generator, dtype=torch.float32)
            latents = scheduler.step(noise, timestep, latents, **draws).prev_sample
            if not latents.isfinite().all():
                return f"latents are not finite after timestep {float(timestep):g}"
    except FAILURES as error:
        return _first_line(error)
    return None


def _no_such_steps(scheduler: Any, requested: int, arguments: dict[str, Any], reason: str) -> str:
    """Return an error message that names the next possible number of steps, or the nearest smaller one."""
    name, trained = type(scheduler).__name__, scheduler.config.get("num_train_timesteps", requested)
    value = f"sampling.num_inference_steps={requested}"
    for kind, numbers in (
        ("next", range(requested + 1, min(requested + MAX_STEP_SUGGESTIONS, trained) + 1)),
        ("largest", range(requested - 1, max(requested - MAX_STEP_SUGGESTIONS, 1) - 1, -1)),
    ):
        for steps in numbers:
            if _failure(scheduler, steps, arguments) is None:
                why = "" if kind == "next" else f" ({reason})"
                return f"{value} is not possible with {name}{why}; the {kind} possible number is {steps}"
    return f"{value}: {name} cannot take these steps: {reason}"


def scheduler_object(scheduler: Any, own: Any) -> Any:
    """Return a scheduler that Python callers give: an object as it is, a class with the config of `own`."""
    check_scheduler_object(scheduler)
    return scheduler.from_config(own.config) if isinstance(scheduler, type) else scheduler  # type: ignore[attr-defined]


def check_scheduler_object(scheduler: Any) -> None:
    """Raise UserError unless `scheduler` is a diffusers scheduler or its class."""
    needed = ("from_config", "set_timesteps", "step")
    if not all(hasattr(scheduler, name) for name in needed):
        raise UserError(
            f"scheduler must be a diffusers scheduler or its class, got {scheduler!r}; "
            "names are possible in from_pretrained and sampling.scheduler"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
