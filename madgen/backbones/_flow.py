"""Schedulers for flow matching: diffusers' classes with the interface of its other schedulers, and their shift.

A flow-matching model predicts the velocity `noise - image`. Latents are `sigma * noise + (1 - sigma) * image`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULE_KEYS = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
"""Keys of a checkpoint's scheduler that change sigmas or steps; a class that lacks one would ignore it."""


def linear_mu(tokens: int, steps: int, config: Mapping[str, Any]) -> float:
    """Return `mu` of dynamic shifting for an image of `tokens` tokens, as in diffusers' `calculate_shift`."""
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (tokens - first) * (high - low) / (last - first))


@dataclass(frozen=True)
class FlowSchedule:
    """The timesteps of a model family, as in its diffusers pipeline."""

    linear_sigmas: bool = False
    """Sigmas before shifting are `linspace(1, 1 / steps, steps)`; otherwise the scheduler's own."""
    mu: Callable[[int, int, Mapping[str, Any]], float] = linear_mu
    """Dynamic shift from the tokens of an image, the number of steps and the scheduler's config."""


class FlowInterface:
    """Mixin that gives a flow-matching scheduler the methods of diffusers' other schedulers."""

    init_noise_sigma = 1.0
    config: Any

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `sigma * noise + (1 - sigma) * original_samples`, with the sigma of each sample's timestep."""
        sigma = self._sigma(timesteps, original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
        return sigma * noise + (1 - sigma) * original_samples

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """Take a step, and predict the clean image."""
        clean = sample - self._sigma(timestep, sample) * model_output
        previous = super().step(model_output, timestep, sample, generator=generator, return_dict=False)[0]  # type: ignore[misc]
        return SimpleNamespace(prev_sample=previous, pred_original_sample=clean) if return_dict else (previous,)

    def _sigma(self, timesteps: Any, like: Tensor) -> Tensor:
        return torch.as_tensor(timesteps, device=like.device, dtype=torch.float32) / self.config.num_train_timesteps


def is_flow_class(cls: Any) -> bool:
    """Return whether a scheduler class is for flow matching alone."""
    return str(cls.__name__).startswith("FlowMatch")


@lru_cache
def adapted(cls: Any) -> Any:
    """Return a class of the same name with `FlowInterface` for flow-matching schedulers, other classes as they are."""
    if not is_flow_class(cls) or issubclass(cls, FlowInterface):
        return cls
    return type(cls.__name__, (FlowInterface, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def is_flow_config(config: Mapping[str, Any], name: str) -> bool:
    """Return whether a scheduler's class name and config are those of a flow-matching model."""
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return name.startswith("FlowMatch") or bool(flow)


def supports_flow(cls: Any) -> bool:
    """Return whether a scheduler class can step a flow-matching model."""
    return is_flow_class(cls) or "flow_shift" in inspect.signature(cls.__init__).parameters


def flow_scheduler(
    cls: Any, own: Mapping[str, Any], steps: int, tokens: int, schedule: FlowSchedule
) -> tuple[Any, dict[str, Any]]:
    """Create a scheduler of class `cls` from the config `own` of a flow-matching checkpoint.

    Returns the scheduler and the arguments of `set_timesteps` besides the number of steps and the device. The shift is
    the checkpoint's own; a dynamic one is that of an image of `tokens` tokens. Raises UserError if `cls` would ignore
    a part of the checkpoint's schedule.
    """
    known = set(inspect.signature(cls.__init__).parameters)
    name = f"sampling.scheduler={cls.__name__}"
    if ignored := [key for key in SCHEDULE_KEYS if own.get(key) and key not in known]:
        raise UserError(f"{name} does not support the checkpoint's {ignored[0]}={own[ignored[0]]}; set it to null")
    shift, mu = own.get("shift", own.get("flow_shift", 1.0)), None
    if own.get("use_dynamic_shifting"):
        mu = schedule.mu(tokens, steps, own)
        # With an exponential time shift, mu and a static shift of exp(mu) give the same sigmas.
        shift = mu if own.get("time_shift_type") == "linear" else math.exp(mu)
    if not 0 < shift < math.inf:
        raise UserError(f"the shift of the timesteps must be > 0, got {shift:g}: see sampling.scheduler_options")
    own = {key: value for key, value in own.items() if key in known or key[0] == "_"}  # diffusers warns of others
    if not is_flow_class(cls):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        if "use_dynamic_shifting" in known:
            flow["use_dynamic_shifting"] = False  # `flow_shift` has it
        return cls.from_config(own, **flow), {}
    if "use_dynamic_shifting" not in known:
        return cls.from_config(own, shift=shift), {}
    options: dict[str, Any] = {} if mu is None else {"mu": mu}
    if schedule.linear_sigmas and not own.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    return cls.from_config(own, **({"shift": shift} if mu is None else {})), options
