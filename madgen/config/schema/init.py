"""`sampling.init`: start from pictures that prompts name, instead of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from madgen.config.schema.checks import changed, check, check_one_of

RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos")
CENTER = "center"
STRENGTH, STRENGTH_AROUND = 0.8, 1.0
"""Strength of calls and commands that do not set it, as in diffusers: to redraw a picture, and around a kept part."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Start from pictures: refine and enlarge them, repaint parts, or continue them to a panorama.

    Prompts name them in the columns `image` and `mask` (white where the picture is kept).
    """

    strength: float | None = None
    """Noise that is added to the picture, as the share of `num_inference_steps` that removes it again, 0..1. 0 only
    enlarges the picture and passes it through the autoencoder; 1 starts from pure noise. null: prompts name no
    pictures."""
    scale: float = 1.0
    """Factor by which pictures are enlarged, > 0."""
    resample: str = "lanczos"
    """Interpolation of pictures that are enlarged: `nearest`, `bilinear`, `bicubic` or `lanczos`."""
    place: Any = None
    """Place of a picture on a larger panorama, whose other parts are generated: `[left, top]` in pixels, or `center`;
    a prompt's `place` overrides it. null: the picture is the whole panorama."""
    feather: int = 32
    """Width in pixels of the edge over which a kept part blends into the generated one, >= 0; inside of it the picture
    is kept exactly."""

    def __post_init__(self) -> None:
        strength = self.strength
        check(
            strength is None or 0 <= strength <= 1,
            f"sampling.init.strength must be in 0..1 or null, got {strength}; 1 starts from pure noise",
        )
        check(
            0 < self.scale < float("inf"),
            f"sampling.init.scale must be a finite number > 0, got {self.scale}; 1 keeps the size",
        )
        check_one_of("sampling.init.resample", self.resample, RESAMPLING)
        check(self.feather >= 0, f"sampling.init.feather must be >= 0 pixels, got {self.feather}; 0 is a hard edge")
        check_place("sampling.init.place", self.place)

    def default_strength(self, has_mask: bool) -> float:
        """Return the strength of a call with an image that does not set one."""
        return STRENGTH_AROUND if has_mask or self.place is not None else STRENGTH

    def check_used(self) -> None:
        """Raise UserError for settings of pictures in a job that starts from noise."""
        unused = next(iter(changed(self)), None)
        check(
            self.strength is not None or unused is None,
            f"sampling.init.{unused} has no effect without pictures; set sampling.init.strength to start from them",
        )

    def denoising_steps(self, num_inference_steps: int, flow: bool) -> int:
        """Return the number of denoising steps that run. Raises UserError if the strength is less than one step.

        Fractions are rounded as in diffusers' image-to-image pipelines, up for flow-matching models (`flow`).
        """
        if self.strength is None:
            return num_inference_steps
        noised = min(num_inference_steps * self.strength, num_inference_steps)
        steps = num_inference_steps - int(num_inference_steps - noised) if flow else int(noised)
        check(
            steps > 0 or self.strength == 0,
            f"sampling.init.strength={self.strength:g} of sampling.num_inference_steps={num_inference_steps} is less "
            f"than one step; raise it to {1 / num_inference_steps:.3g}, or set it to 0",
        )
        return steps


def check_place(name: str, place: Any) -> None:
    """Raise UserError unless `place` is None, `center`, or two whole numbers of pixels >= 0."""
    pair = isinstance(place, list | tuple) and len(place) == 2 and all(type(at) is int and at >= 0 for at in place)
    check(
        place is None or place == CENTER or pair,
        f"{name} must be [left, top] in pixels >= 0, or center, got {place!r}",
    )
