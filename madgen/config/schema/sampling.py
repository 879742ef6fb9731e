"""`sampling`: denoising schedule, guidance, size and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from madgen.config.schema.checks import check, check_one_of, quoted
from madgen.config.schema.init import InitConfig

AUTO_BATCH = "auto"
"""Value of `sampling.batch_size` that selects the batch size by device."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Denoising schedule, guidance and decoding: the settings of a panorama besides its prompt, seed and size.

    Shared by jobs (`SamplingConfig`), the metadata of samples and `PanoramaSampler`.
    """

    loop: bool = False
    """Sample 360 degree panoramas: views, attention and decoding wrap around, so the right edge continues at the left
    one."""
    num_inference_steps: int = 50
    """Number of denoising steps, 1..10000."""
    guidance_scale: float = 7.5
    """Weight of classifier-free guidance, >= 0; values <= 1 disable it."""
    guidance_steps: tuple[int, ...] | None = None
    """`[first, end]`: apply guidance only in steps `first` to `end - 1`, with 0 <= first < end <= num_inference_steps;
    the other steps take one UNet pass instead of two (Kynkäänniemi et al., 2024). null: in all steps."""
    scheduler: str | None = None
    """Name of a diffusers scheduler class, such as `DDIMScheduler`; null is the checkpoint's own scheduler."""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the scheduler class that replace those of the checkpoint's config, such as
    `{timestep_spacing: trailing, use_karras_sigmas: true}`."""
    original_inference_steps: int | None = None
    """Number of steps that a consistency model was distilled with, > 0, for schedulers that take it (LCM). null is the
    value in the scheduler's config."""
    init: InitConfig = field(default_factory=InitConfig)
    decode: str = "auto"
    """Decoding of the latents: `whole` (the panorama in one pass), `tiled` (blended tiles of two views, less memory) or
    `auto` (tiled above 2^22 pixels)."""

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        check(0 < steps <= 10_000, f"sampling.num_inference_steps must be in 1..10000, got {steps}")
        scale = self.guidance_scale
        check(0 <= scale < float("inf"), f"sampling.guidance_scale must be a finite number >= 0, got {scale}")
        self._check_guidance_steps()
        original = self.original_inference_steps
        check(original is None or original > 0, f"sampling.original_inference_steps must be > 0, got {original}")
        check_one_of("sampling.decode", self.decode, ("auto", "whole", "tiled"))
        options = self.scheduler_options
        check(
            isinstance(options, Mapping) and all(isinstance(key, str) for key in options),
            f"sampling.scheduler_options must be a mapping such as {{timestep_spacing: trailing}}, got {options!r}",
        )

    def _check_guidance_steps(self) -> None:
        if self.guidance_steps is None:
            return
        check(
            len(self.guidance_steps) == 2
            and 0 <= self.guidance_steps[0] < self.guidance_steps[1] <= self.num_inference_steps,
            f"sampling.guidance_steps must be [first, end] with 0 <= first < end <= num_inference_steps="
            f"{self.num_inference_steps}, got {list(self.guidance_steps)}; null means all steps",
        )
        check(
            self.guidance_scale > 1,
            f"sampling.guidance_steps has no effect with guidance_scale={self.guidance_scale} <= 1; set it to null",
        )

    def denoising_steps(self, flow: bool) -> int:
        """Return the number of denoising steps that run; `flow`: the backbone is a flow-matching model.

        Raises UserError if `init.strength` leaves none, or not those of `guidance_steps`.
        """
        steps = self.init.denoising_steps(self.num_inference_steps, flow)
        check(
            self.guidance_steps is None or self.guidance_steps[1] <= steps,
            f"sampling.guidance_steps={list(self.guidance_steps or ())} must end within the {steps} steps that run at "
            f"sampling.init.strength={self.init.strength}; lower its end",
        )
        return steps

    def described(self, steps: int) -> str:
        """Return the number of denoising steps that run, for messages."""
        number = f"sampling.num_inference_steps={self.num_inference_steps}"
        if self.init.strength is None:
            return number
        return f"{steps} (the steps of {number} that run at sampling.init.strength={self.init.strength:g})"

    @property
    def guided_steps(self) -> range:
        """Return the steps with classifier-free guidance."""
        return range(self.num_inference_steps) if self.guidance_steps is None else range(*self.guidance_steps)

    @classmethod
    def from_config(cls, config: SamplingParams) -> SamplingParams:
        """Return the parameters of a job's `sampling`, without size and batch size."""
        return SamplingParams(**{field.name: getattr(config, field.name) for field in fields(SamplingParams)})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> SamplingParams:
        """Read the parameters from `sampling` of a sample's JSON; keys that older versions lack have their defaults."""
        values = {field.name: metadata[field.name] for field in fields(SamplingParams) if field.name in metadata}
        if values.get("guidance_steps") is not None:
            values["guidance_steps"] = tuple(values["guidance_steps"])
        if "init" in values:
            values["init"] = InitConfig(**values["init"])
        return SamplingParams(**values)

    def to_metadata(self) -> dict[str, Any]:
        """Return the content of `sampling` in a sample's JSON; its picture's place is recorded elsewhere."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        if not self.scheduler_options:  # unknown to earlier versions
            del values["scheduler_options"]
        del values["init"]
        if self.init.strength is not None:
            values["init"] = {name: value for name, value in asdict(self.init).items() if name != "place"}
        return values


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplingParams):
    """Size of the panoramas, denoising schedule and guidance."""

    height: int = 512
    """Height in pixels, > 0; a prompt's `height` overrides it. Must be covered by views: other sizes are refused with
    the nearest possible ones."""
    width: int = 3072
    """Width in pixels, > 0; a prompt's `width` overrides it."""
    batch_size: Any = 1
    """Number of panoramas of one size that are sampled together on a device, > 0. `auto` is as many as keep an NVIDIA
    GPU busy, and 1 on other devices. If memory runs out, batches are split. Pixels may differ in the last bits between
    batch sizes."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check(getattr(self, name) > 0, f"sampling.{name} must be > 0, got {getattr(self, name)}")
        size = self.batch_size
        check(
            size == AUTO_BATCH or (type(size) is int and size > 0),
            f"sampling.batch_size must be an integer > 0 or auto, got {quoted(size)}",
        )
        super().__post_init__()
