"""Generators, tensors and schedules of `sampler(...)`, in place of seeds, prompts and the scheduler's timesteps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from madgen.backbones import TEXTS_ONLY, PromptEmbeddings
from madgen.diffusion.denoise import Generators
from madgen.utils.errors import UserError
from madgen.utils.validation import listed, number, whole


@dataclass(frozen=True)
class CallInputs:
    """Arguments of `sampler(...)`, see there."""

    generator: Generators = None
    latents: Tensor | None = None
    """Initial noise [B, C, h, w]."""
    embeddings: PromptEmbeddings = TEXTS_ONLY
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    eta: float = 0.0
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)
    """Precision of the initial noise: as in diffusers, that of the network."""

    def __post_init__(self) -> None:
        given = self.embeddings
        if given.prompt_embeds is None and given.pooled_prompt_embeds is not None:
            raise UserError("pooled_prompt_embeds need prompt_embeds; pass both")
        if given.negative_prompt_embeds is None and given.negative_pooled_prompt_embeds is not None:
            raise UserError("negative_pooled_prompt_embeds need negative_prompt_embeds; pass both")
        if self.timesteps is not None and self.sigmas is not None:
            raise UserError("pass either timesteps or sigmas, not both")

    @classmethod
    def parse(
        cls,
        generator: Any,
        latents: Any,
        embeddings: PromptEmbeddings,
        timesteps: Any,
        sigmas: Any,
        eta: Any,
    ) -> CallInputs:
        """Validate the arguments of `sampler(...)`; see there."""
        tensors = {
            name: _parse_tensor(name, value, 2 if "pooled" in name else 3) for name, value in vars(embeddings).items()
        }
        return cls(
            _parse_generator(generator),
            _parse_tensor("latents", latents, 4),
            PromptEmbeddings(**tensors),
            None if timesteps is None else [whole("each of timesteps", t) for t in listed("timesteps", timesteps)],
            None if sigmas is None else [number("each of sigmas", s, 0) for s in listed("sigmas", sigmas)],
            number("eta", eta, 0),
        )

    @property
    def steps(self) -> int | None:
        """Number of custom timesteps or sigmas; None: the schedule follows `num_inference_steps`."""
        custom = self.timesteps if self.timesteps is not None else self.sigmas
        return None if custom is None else len(custom)

    def repeated(self, copies: int, prompts: int, dtype: torch.dtype) -> CallInputs:
        """Return the inputs of `copies` panoramas of each of `prompts` prompts. Raises UserError for other numbers."""
        embeddings = {}
        for name, tensor in vars(self.embeddings).items():
            if tensor is not None and len(tensor) != prompts:
                raise UserError(f"{name} must be of {prompts} prompts, got {len(tensor)}")
            embeddings[name] = None if tensor is None else tensor.repeat_interleave(copies, 0)
        count = copies * prompts
        if isinstance(self.generator, list) and len(self.generator) != count:
            raise UserError(
                f"generator must be one or a list of {count}, one for each panorama, got {len(self.generator)}"
            )
        return replace(self, dtype=dtype, embeddings=PromptEmbeddings(**embeddings))

    def seeds(self, count: int) -> list[int]:
        """Return seeds for what does not depend on the noise: the background colors of regions."""
        generators = self.generator if isinstance(self.generator, list) else [self.generator] * count
        return [torch.initial_seed() % 2**64 if one is None else one.initial_seed() % 2**64 for one in generators]

    def draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw noise [B, C, h, w] as diffusers does, and convert it to float32."""
        each = self.generator if isinstance(self.generator, list) else [self.generator]
        part = (shape[0] // len(each), *shape[1:])
        places = [device if one is None else one.device for one in each]
        draws = [
            torch.randn(part, generator=g, device=at, dtype=self.dtype) for g, at in zip(each, places, strict=True)
        ]
        return torch.cat(draws).to(device, torch.float32)

    def apply_schedule(self, scheduler: Any) -> None:
        """Set custom timesteps or sigmas, and eta. Raises UserError if the scheduler does not take them."""
        name = type(scheduler).__name__
        for argument, values in (("timesteps", self.timesteps), ("sigmas", self.sigmas)):
            if values is None:
                continue
            if argument not in inspect.signature(scheduler.set_timesteps).parameters:
                raise UserError(f"{name} takes no custom {argument}; pass num_inference_steps")
            try:
                scheduler.set_timesteps(**{argument: values}, device=scheduler.timesteps.device)
            except (ValueError, TypeError) as error:
                raise UserError(f"{argument}: {str(error).splitlines()[0]}") from error
        if self.eta:
            if "eta" not in inspect.signature(scheduler.step).parameters:
                raise UserError(f"eta={self.eta:g} has no effect with {name}, unlike DDIMScheduler; leave it out")
            scheduler.step = partial(scheduler.step, eta=self.eta)


def _parse_generator(generator: Any) -> Generators:
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    generators = list(generator) if isinstance(generator, list | tuple) else []
    if not generators or not all(isinstance(one, torch.Generator) for one in generators):
        raise UserError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    return generators


def _parse_tensor(name: str, value: Any, dimensions: int) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.ndim != dimensions or not value.is_floating_point():
        actual = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"{name} must be a floating-point tensor of {dimensions} dimensions, got {actual}")
    return value
