"""What sampling starts from: noise, or the latents of pictures at a lower noise level (SDEdit).

Cells that are known are put back after each step, at the noise level of the next one, while the others are generated
(as in diffusers' inpainting with the weights of text-to-image models).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Start:
    """Where denoising begins, and which cells it keeps: here with noise, and none."""

    def first(self, scheduler: Any) -> int:
        """Return the index of the first evaluation in the scheduler's timesteps; prepare the scheduler for it."""
        return 0

    def latents(self, noise_BCHW: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        """Return the latents at the first timestep; None: there is no step."""
        result: Tensor = noise_BCHW * scheduler.init_noise_sigma
        return result

    def keep(self, latents_BCHW: Tensor, noise_BCHW: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        """Return latents with what is known in place; `timestep`: the next one, None after the last step."""
        return latents_BCHW


@dataclass(frozen=True)
class FromPictures(Start):
    """Start from clean latents with the noise of the first step that runs."""

    clean_BCHW: Tensor
    skipped: int
    """Denoising steps that do not run."""
    steps: int
    """Denoising steps of the schedule."""
    known_B1HW: Tensor | None = None
    """Cells that keep their latents, 1 or 0; None: none."""
    pure_noise: bool = False
    """Strength 1: start from noise, as without pictures."""

    def first(self, scheduler: Any) -> int:
        """Skip steps as the `get_timesteps` of diffusers' image-to-image pipelines."""
        evaluation = self.skipped * scheduler.order if self.skipped < self.steps else len(scheduler.timesteps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(evaluation)
        return int(evaluation)

    def latents(self, noise_BCHW: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        if self.pure_noise:
            return super().latents(noise_BCHW, scheduler, timestep)
        return self._noised(noise_BCHW, scheduler, timestep)

    def keep(self, latents_BCHW: Tensor, noise_BCHW: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        if self.known_B1HW is None:
            return latents_BCHW
        known = self._noised(noise_BCHW, scheduler, timestep)
        return torch.where(self.known_B1HW > 0, known, latents_BCHW)

    def _noised(self, noise_BCHW: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        if timestep is None:
            return self.clean_BCHW
        times = timestep.reshape(1).repeat(len(self.clean_BCHW))
        noised: Tensor = scheduler.add_noise(self.clean_BCHW, noise_BCHW, times)
        return noised
