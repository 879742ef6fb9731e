"""Schema of a job file: frozen dataclasses that validate their values on construction."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from madgen.config.field_types import check_fields
from madgen.utils.credentials import check_no_credentials
from madgen.utils.errors import UserError
from madgen.utils.validation import check_path, expand_user

PROMPT_FIELDS = ("id", "prompt", "negative_prompt", "width", "height", "seed", "regions", "across")
"""Fields of a row of a prompt file."""
PIXEL_SCORES = ("seam", "wrap", "coherence")
"""Scores computed from pixels, see `madgen.images.scores`."""
AUTO_BATCH = "auto"
"""Value of `sampling.batch_size` that selects the batch size by device."""
PATHS = {"output.dir", "prompts.source", "prompts.regions.mask", "backbone.pretrained", "backbone.config"}
PATHS |= {"backbone.loras.weights", "safety.checker", "scores.clip"}
"""Keys whose values may be paths."""
WANDB_MODES = ("online", "offline", "disabled")
SCORES = (*PIXEL_SCORES, "clip")
"""Keys that may occur under `scores` in a sample's JSON."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    _check(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of an error about an unknown name: the most similar known name, or all known names."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _changed(config: Any) -> dict[str, Any]:
    """Return the fields of a config that differ from their defaults."""
    return {each.name: value for each in fields(config) if (value := getattr(config, each.name)) != each.default}


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings in nested mappings and lists, with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)


def check_recordable(settings: Any) -> None:
    """Raise UserError if a string cannot be recorded in the dataset, or must not be (credentials), or is no path."""
    for key, text in _strings(settings):
        check_no_credentials(key, text)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key} must be valid Unicode, got {text!r}") from None
        _check("\0" not in text, f"{key} contains a NUL character: {text!r}; remove it")
        if key in PATHS:
            check_path(key, text)


def require_job(value: Any) -> Job:
    """Return `value` if it is a Job; raise UserError otherwise, for example for the path of a job file."""
    _check(isinstance(value, Job), f"job must be a madgen.Job, see madgen.load_job(path), got {value!r}")
    return value


def check_url(name: str, url: str) -> None:
    """Raise UserError if `url` is not the URL of a folder, or may contain credentials (which are not printed then)."""
    protocol, separator, rest = url.partition("://")
    _check(
        ":" not in (rest if separator else url).rpartition("@")[0] and "?" not in url and "#" not in url,
        f"{name} must not contain a password, key or query, since it is recorded; set credentials in the environment",
    )
    _check(
        re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) is not None and rest.strip("/") != "" and url.isprintable(),
        f"{name} must be a URL such as s3://bucket/folder or file:///a/folder, got {url!r}",
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter to fuse into the weights."""

    weights: str
    """A `.safetensors` file, a folder that contains one, or a Hugging Face Hub id."""
    scale: float = 1.0
    """Factor of the LoRA's weights: 1 is full strength, 0 has no effect, negative values invert it."""

    def __post_init__(self) -> None:
        _check(self.weights != "", "backbone.loras: weights is empty")
        _check(abs(self.scale) < float("inf"), f"backbone.loras: scale must be a finite number, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The pretrained diffusion model."""

    name: str = "sd"
    """Model family, a module of `madgen/backbones/`: `sd` (Stable Diffusion 1.x and 2.x, latent consistency models),
    `sdxl` (Stable Diffusion XL), `sd3` (Stable Diffusion 3 and 3.5) or `flux` (FLUX.1)."""
    pretrained: str = "demo"
    """Weights: `demo` (a small model that is part of madgen), a diffusers folder, a Hugging Face Hub id, or a single
    `.safetensors` file in the original layout."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository; null is its default branch."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`; null is the files without a variant."""
    config: str | None = None
    """For a single `.safetensors` file: folder or Hub id of a pipeline that provides the model configs and tokenizers.
    null lets diffusers infer it from the file, which needs the Hub or its local cache."""
    loras: list[LoraConfig] = field(default_factory=list)  # OmegaConf does not validate the items of a tuple
    """LoRAs to fuse into the weights, each multiplied by its scale."""
    prediction_type: str | None = None
    """What the network predicts: `epsilon`, `v_prediction` or `sample`. null is what the scheduler's config and the
    marks of a single file say; if they contradict each other, the job is refused until it is set."""
    accept_licence: bool = False
    """Set to true if you comply with the licence of weights that restricts training on their pictures, such as FLUX.1
    [dev]; such weights are refused otherwise."""
    dtype: str = "auto"
    """Precision: `float32`, `bfloat16` or `float16`; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    compile: bool = False
    """Compile the UNet and the decoder with `torch.compile`. Sampling is faster after a warm-up of some minutes for
    each panorama size; pixels may differ in the last bits."""
    cuda_graphs: bool = True
    """Replay UNet passes over few views (up to 32 views of 64x64 latent cells, with guidance) as CUDA graphs on NVIDIA
    GPUs. Faster, at the cost of memory; pixels do not change."""
    offload: str = "none"
    """Models of a transformer that leave the GPU while they are not used: `none`; `text_encoders`, which run once for
    the distinct prompts of a shard and then make room; `model`: only the model that runs is on the GPU (diffusers' CPU
    offload, slower). Pixels do not change."""
    max_sequence_length: int | None = None
    """Number of tokens that the text encoder of a transformer (T5) reads, > 0; longer prompts are truncated. null is
    the default of the diffusers pipeline: 512 for FLUX.1, 256 for Stable Diffusion 3. Must be null for UNets."""

    def __post_init__(self) -> None:
        _one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("backbone.offload", self.offload, ("none", "text_encoders", "model"))
        length = self.max_sequence_length
        _check(length is None or length > 0, f"backbone.max_sequence_length must be > 0 tokens or null, got {length}")
        if self.prediction_type is not None:
            _one_of("backbone.prediction_type", self.prediction_type, ("epsilon", "v_prediction", "sample"))


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The views that the canvas is split into."""

    layout: str = "overlapping"
    """`overlapping`: the same overlapping views in each step (MultiDiffusion). `shifted`: adjacent views that move in
    each step (SpotDiffusion), by multiples of `stride` while attention is merged and by any number of latent cells
    otherwise. `whole`: a single view, the whole canvas (direct inference)."""
    size: int | None = None
    """Height and width of a view in latent cells, > 0; null is the size that the backbone was trained at."""
    stride: int | None = None
    """Distance between neighbouring views in latent cells, > 0; null is a quarter of `size`. Must be null where it has
    no effect: with `whole`, and with `shifted` views without MAD and without `overlap_from`."""
    overlap_from: int | None = None
    """First step, counted from 0, in which `shifted` views overlap by `stride` instead, to blend the last borders.
    null: in no step."""

    def __post_init__(self) -> None:
        _one_of("method.views.layout", self.layout, ("overlapping", "shifted", "whole"))
        first = self.overlap_from
        _check(
            first is None or (first >= 0 and self.layout == "shifted"),
            f"method.views.overlap_from must be a step >= 0 and needs layout=shifted, got {first} with "
            f"layout={self.layout}; set it to null",
        )
        for name in ("size", "stride"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"method.views.{name} must be > 0 latent cells, got {value}")


@dataclass(frozen=True, kw_only=True)
class MadConfig:
    """Merge-Attend-Diffuse: views are merged into one canvas inside the attention layers."""

    steps: int | None = 15
    """Number of steps, from the first one on, in which attention is merged (the paper's tau), >= 0. 0 is plain
    MultiDiffusion, unless `cross_attention` is `always`. null: `share` sets it."""
    share: float | None = None
    """Instead of `steps`: the share of `sampling.num_inference_steps`, 0..1, rounded to whole steps. Of `steps` and
    `share`, the one that is set last applies. null: `steps` sets it."""
    blocks: tuple[str, ...] = ("all",)
    """Layers in which attention is merged: `all`; for UNets `down`, `mid` and `up`; for transformers `early`, `middle`
    and `late` (thirds by depth), `double` and `single` (blocks with separate or shared weights for prompt and image);
    or patterns of layer names such as `up_blocks.1.*attn1*`. At least one."""
    cross_attention: str = "scheduled"
    """When cross-attention is merged: `scheduled`, in the first `steps` steps (the paper), or `always`, in all steps
    (the released code). Transformers have no separate cross-attention and take `scheduled` only."""
    positions: str = "canvas"
    """Positions of image tokens in steps in which a transformer's attention is merged: `canvas` (their place on the
    canvas), `fit` (the same, scaled into the range of a view) or `local` (the mean of their places in the views). Other
    steps use each view's own positions. Only for transformers."""

    def __post_init__(self) -> None:
        if self.share is not None and self.steps == MadConfig.steps:
            object.__setattr__(self, "steps", None)
        _check(
            (self.steps is None) != (self.share is None),
            f"method.mad.steps={self.steps} and method.mad.share={self.share}: set one of them, and the other to null",
        )
        _check(
            self.steps is None or self.steps >= 0,
            f"method.mad.steps must be >= 0, got {self.steps}; 0 gives plain MultiDiffusion",
        )
        _check(
            self.share is None or 0 <= self.share <= 1,
            f"method.mad.share must be in 0..1 of the steps, got {self.share}; 1 merges attention in all steps",
        )
        _one_of("method.mad.cross_attention", self.cross_attention, ("scheduled", "always"))
        _one_of("method.mad.positions", self.positions, ("canvas", "fit", "local"))
        _check(len(self.blocks) > 0, "method.mad.blocks is empty; set method.mad.steps=0 to disable MAD")

    @property
    def merged_steps(self) -> int:
        """Number of steps in which attention is merged; in a Job, `share` is already converted to `steps`."""
        assert self.steps is not None, "share needs the number of steps: see MethodConfig.with_steps"
        return self.steps


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How the views' noise predictions are merged, in the steps in which attention is not merged."""

    operator: str = "average"
    """`average`: the mean of the views, with `weights` (MultiDiffusion, Guided Fusion). `swap`: each column of an
    overlap is taken from one view, in turn, which keeps the high frequencies that averaging removes (SaFa)."""
    weights: str = "uniform"
    """Weights of `average` within a view: `uniform`, `radial` (linear, 1 in the middle, 0 in the corner; Guided Fusion)
    or `gaussian` (Mixture of Diffusers)."""
    width: int = 1
    """Width of the stripes of `swap` in latent cells, > 0."""
    reference_steps: int = 0
    """Number of steps, from the first one on, in which `swap` takes every other row in the middle of a view, where no
    other view lies, from a reference view, >= 0 (SaFa). Needs `layout: overlapping`, no MAD, no regions, and a
    scheduler whose steps do not depend on earlier ones, such as DDIM."""

    def __post_init__(self) -> None:
        _one_of("method.merge.operator", self.operator, ("average", "swap"))
        _one_of("method.merge.weights", self.weights, ("uniform", "radial", "gaussian"))
        _check(self.width > 0, f"method.merge.width must be > 0 latent cells, got {self.width}")
        _check(self.reference_steps >= 0, f"method.merge.reference_steps must be >= 0, got {self.reference_steps}")
        swaps = self.operator == "swap"
        _check(
            self.weights == "uniform" or not swaps,
            f"method.merge.weights={self.weights} has no effect with operator=swap; set it to uniform",
        )
        _check(
            self.width == 1 or swaps,
            f"method.merge.width={self.width} has no effect with operator=average; set it to 1, or operator=swap",
        )
        _check(
            self.reference_steps == 0 or swaps,
            f"method.merge.reference_steps={self.reference_steps} needs operator=swap; set operator=swap, or it to 0",
        )

    @property
    def is_mean(self) -> bool:
        """Return whether predictions are merged by their plain mean."""
        return self.operator == "average" and self.weights == "uniform"

    @property
    def summary(self) -> str:
        """Return the settings that differ from the defaults, as on the command line."""
        return ", ".join(f"method.merge.{name}={value}" for name, value in _changed(self).items())

    def check_steps(self, mad_steps: int, num_inference_steps: int) -> None:
        """Raise UserError if the merge has no effect in so few denoising steps."""
        _check(
            self.is_mean or mad_steps < num_inference_steps,
            f"{self.summary} has no effect: attention is merged in all of sampling.num_inference_steps="
            f"{num_inference_steps} steps; lower method.mad.steps={mad_steps}, or set it to 0 to disable MAD",
        )
        _check(
            self.reference_steps <= num_inference_steps,
            f"method.merge.reference_steps must be <= sampling.num_inference_steps={num_inference_steps}, "
            f"got {self.reference_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The initial noise."""

    align: float = 0.0
    """Spherical interpolation of the initial noise towards the noise of one view, tiled: 0 is independent noise, 1 the
    same noise in every tile (style alignment, Guided Fusion), 0..1."""

    def __post_init__(self) -> None:
        _check(0 <= self.align <= 1, f"method.noise.align must be in 0..1, got {self.align}; 0 disables it")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """SyncDiffusion: gradient steps that reduce the LPIPS distance between each view and the middle view."""

    weight: float = 0.0
    """Weight of the gradient, >= 0; step i uses `weight * decay ** i`. 0 disables SyncDiffusion; the paper uses 20."""
    decay: float = 0.95
    """Factor of the weight from step to step, 0 < decay <= 1; 1 keeps it constant."""
    steps: int = 50
    """Number of steps, from the first one on, in which gradients are applied, >= 0."""
    every: int = 1
    """Apply gradients only in each `every`-th of these steps, >= 1."""
    network: str = "vgg"
    """Features for LPIPS: `vgg` (VGG16 trained on ImageNet) or `random` (VGG16 without training, needs no download)."""

    def __post_init__(self) -> None:
        _check(0 <= self.weight < float("inf"), f"method.sync.weight must be >= 0, got {self.weight}; 0 disables it")
        _check(0 < self.decay <= 1, f"method.sync.decay must be > 0 and <= 1, got {self.decay}; 1 means no decay")
        _check(self.steps >= 0, f"method.sync.steps must be >= 0, got {self.steps}")
        _check(
            self.steps > 0 or self.weight == 0,
            f"method.sync.steps=0 leaves method.sync.weight={self.weight:g} without effect; set the weight to 0",
        )
        _check(self.every >= 1, f"method.sync.every must be >= 1 step, got {self.every}; 1 means every step")
        _one_of("method.sync.network", self.network, ("vgg", "random"))


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """Sampling of prompts with regions."""

    bootstrapping: int | None = None
    """Number of steps, from the first one on, in which a region is denoised over a plain colour outside its mask, so
    that its content stays inside, >= 0. 0 disables it; null is two fifths of the steps, as in the released code."""

    def __post_init__(self) -> None:
        _check(
            self.bootstrapping is None or self.bootstrapping >= 0,
            f"method.regions.bootstrapping must be >= 0 steps or null, got {self.bootstrapping}",
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The joint diffusion method. MultiDiffusion, MAD, SyncDiffusion and SpotDiffusion are points in this space."""

    views: ViewsConfig = field(default_factory=ViewsConfig)
    mad: MadConfig = field(default_factory=MadConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        layout, merge = self.views.layout, self.merge
        _check(
            merge.is_mean or layout != "whole",
            f"{merge.summary} has no effect with layout=whole, which has a single view; remove it",
        )
        reference = f"method.merge.reference_steps={merge.reference_steps}"
        _check(
            not merge.reference_steps or layout == "overlapping",
            f"{reference} needs views that stay in place, got method.views.layout={layout}; use overlapping",
        )
        _check(
            not merge.reference_steps or not (self.mad.steps or self.mad.share or self.mad.cross_attention == "always"),
            f"{reference} acts in the first steps, in which method.mad merges attention; set method.mad.steps=0 and "
            "method.mad.cross_attention=scheduled",
        )
        _check(
            not (self.sync.weight and self.views.layout == "whole"),
            "method.sync compares views, but layout=whole has only one; set method.sync.weight to 0",
        )

    def with_steps(self, num_inference_steps: int) -> MethodConfig:
        """Return the method with `mad.share` converted to `mad.steps`."""
        share = self.mad.share
        if share is None:
            return self
        steps = int(share * num_inference_steps + 0.5)
        return replace(self, mad=replace(self.mad, steps=steps, share=None))

    @property
    def operators(self) -> str:
        """Return the settings of `merge` and `noise` that differ from the defaults, as on the command line."""
        align = [f"method.noise.align={self.noise.align}"] if self.noise.align else []
        return ", ".join([*filter(None, [self.merge.summary]), *align])


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
    decode: str = "auto"
    """Decoding of the latents: `whole` (the panorama in one pass), `tiled` (blended tiles of two views, less memory) or
    `auto` (tiled above 2^22 pixels)."""

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        _check(0 < steps <= 10_000, f"sampling.num_inference_steps must be in 1..10000, got {steps}")
        _check(
            0 <= self.guidance_scale < float("inf"), f"sampling.guidance_scale must be >= 0, got {self.guidance_scale}"
        )
        self._check_guidance_steps()
        original = self.original_inference_steps
        _check(original is None or original > 0, f"sampling.original_inference_steps must be > 0, got {original}")
        _one_of("sampling.decode", self.decode, ("auto", "whole", "tiled"))
        options = self.scheduler_options
        _check(
            isinstance(options, Mapping) and all(isinstance(key, str) for key in options),
            f"sampling.scheduler_options must be a mapping such as {{timestep_spacing: trailing}}, got {options!r}",
        )

    def _check_guidance_steps(self) -> None:
        if self.guidance_steps is None:
            return
        _check(
            len(self.guidance_steps) == 2
            and 0 <= self.guidance_steps[0] < self.guidance_steps[1] <= self.num_inference_steps,
            f"sampling.guidance_steps must be [first, end] with 0 <= first < end <= num_inference_steps="
            f"{self.num_inference_steps}, got {list(self.guidance_steps)}; null means all steps",
        )
        _check(
            self.guidance_scale > 1,
            f"sampling.guidance_steps has no effect with guidance_scale={self.guidance_scale} <= 1; set it to null",
        )

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
        return SamplingParams(**values)

    def to_metadata(self) -> dict[str, Any]:
        """Return the content of `sampling` in a sample's JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        if not self.scheduler_options:  # unknown to earlier versions
            del values["scheduler_options"]
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
            _check(getattr(self, name) > 0, f"sampling.{name} must be > 0, got {getattr(self, name)}")
        size = self.batch_size
        _check(
            size == AUTO_BATCH or (type(size) is int and size > 0),
            f"sampling.batch_size must be an integer > 0 or auto, got {size!r}",
        )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The prompts, and how many panoramas are sampled from each."""

    source: str = "prompts.txt"
    """A prompt file: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv` (each also with `.gz`) or `.parquet`; several files as a
    pattern such as `prompts/**/*.jsonl`, read in the order of their paths; the URL of such a file on any file system
    that fsspec supports (`s3://`, `gs://`, `https://`); or a Hugging Face dataset: `hf://owner/name`,
    `hf://owner/name/config`, or `hf:///folder` for a local one. Relative paths are resolved against the current
    directory first, then against the job file."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns (or JSON keys) of the source to read, by field: `{prompt: caption}` reads the prompt from `caption`.
    Fields are `id`, `prompt`, `negative_prompt`, `width`, `height`, `seed`, `regions` and `across`. If empty, columns
    must have these names; unknown columns are errors, see `keep_columns`."""
    keep_columns: Any = None
    """Further columns (or JSON keys) of the source to keep with each sample, in `columns` of its JSON and as columns of
    `index.parquet`: a list of names, or `all`. null: none."""
    comments: str | None = None
    """Ignore lines of a `.txt` that start with this text, such as `#`; null: every line is a prompt."""
    template: str | None = None
    """Text with attributes in braces, such as `a {time} view of {place}`, in place of `source`; `{{` and `}}` are
    braces. A prompt is generated for each combination of `attributes`, or for `samples` random ones."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Values of the attributes in `template`, by name: a list such as `[dawn, noon]`, or `{values: [dawn, noon],
    weights: [3, 1]}` for random combinations. They are kept with each sample as `keep_columns` are."""
    samples: int | None = None
    """Number of random combinations of `attributes`, > 0, drawn independently by `seed`; equal ones are treated as
    `on_duplicate` requests, or renamed if it is `error`. null: all combinations."""
    negative_prompt: str = ""
    """Negative prompt of rows that have none."""
    samples_per_prompt: int = 1
    """Number of panoramas for each prompt, with different seeds, 1..10000."""
    limit: int | None = None
    """Use only the first `limit` prompts, > 0; null: all."""
    seed: int = 0
    """Base seed, 0..2^64-1. A sample's seed is derived from it, the prompt's id and the sample's index. A row's `seed`
    replaces it, and is itself the seed of the row's first sample."""
    on_duplicate: str = "error"
    """Handling of prompts with equal ids: `error`, `skip` all but the first, or `rename` them."""
    shuffle: bool = False
    """Shuffle the prompts before they are split into shards, by `seed` and their ids. Keys, seeds and pixels do not
    change."""
    regions: list[dict[str, Any]] = field(default_factory=list)
    """Regions of rows that have none, each `{mask, prompt, negative_prompt}`. `mask` is `[left, top, right, bottom]` in
    pixels, or an image file that is white inside the region, resolved as `source` is. `negative_prompt` defaults to
    that of the row. Cannot be combined with `across`."""
    allow_masks_outside: bool = False
    """Let rows name mask files outside the folder of their prompt file, such as by an absolute path. Masks are
    published in the dataset: set it only for prompt files that you trust."""
    across: list[str] = field(default_factory=list)
    """Further prompts of rows that have none, spaced evenly along the width and blended; the row's own prompt is at the
    left edge."""

    def __post_init__(self) -> None:
        _check(
            1 <= self.samples_per_prompt <= 10_000,
            f"prompts.samples_per_prompt must be in 1..10000, got {self.samples_per_prompt}",
        )
        _check(0 <= self.seed < 2**64, f"prompts.seed must be in 0..2^64-1, got {self.seed}")
        _check(not (self.regions and self.across), "prompts.regions and prompts.across exclude each other; give one")
        _check(self.limit is None or self.limit > 0, f"prompts.limit must be > 0 prompts or null, got {self.limit}")
        _check(self.split != "", "prompts.split is empty; use for example train")
        for field_name, column in self.columns.items():
            _one_of("a key of prompts.columns", field_name, PROMPT_FIELDS)
            _check(column != "", f"prompts.columns.{field_name} is empty; set it to a column of prompts.source")
        _check(
            not self.columns or "prompt" in self.columns,
            "prompts.columns has no key prompt; set prompts.columns.prompt to the column that contains the prompt",
        )
        _check(
            len(set(self.columns.values())) == len(self.columns),
            f"prompts.columns names a column twice: {', '.join(self.columns.values())}",
        )
        _one_of("prompts.on_duplicate", self.on_duplicate, ("error", "skip", "rename"))
        self._check_keep_columns()
        self._check_template()
        if "://" in self.source and not self.source.startswith("hf://"):
            check_url("prompts.source", self.source)

    def _check_keep_columns(self) -> None:
        keep = self.keep_columns
        names = keep if isinstance(keep, list | tuple) else []
        _check(
            keep in (None, "all") or (names != [] and all(isinstance(name, str) and name for name in names)),
            f"prompts.keep_columns must be all, a list of column names such as [category], or null, got {keep!r}",
        )
        _check(len(set(names)) == len(names), f"prompts.keep_columns names a column twice: {', '.join(names)}")
        _check(self.comments != "", "prompts.comments is empty; set it to the start of comments, such as '#', or null")

    def _check_template(self) -> None:
        if self.template is None:
            unused = next((name for name in ("attributes", "samples") if getattr(self, name)), None)
            _check(unused is None, f"prompts.{unused} has no effect without prompts.template; set it, or remove it")
            _check(self.samples is None, "prompts.samples has no effect without prompts.template; set it to null")
            return
        _check(self.samples is None or self.samples > 0, f"prompts.samples must be > 0 or null, got {self.samples}")
        _check(
            self.source == PromptsConfig.__dataclass_fields__["source"].default,
            f"prompts.template and prompts.source={self.source} exclude each other; remove one of them",
        )
        for name, default in (("columns", {}), ("keep_columns", None), ("comments", None), ("split", "train")):
            _check(
                getattr(self, name) == default,
                f"prompts.{name} has no effect with prompts.template, which reads no source; remove it",
            )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The dataset on disk."""

    dir: str | None = None
    """Directory of the dataset, relative to the current directory; null is `out/<name>`."""
    samples_per_shard: int = 128
    """Number of samples in a tar file, > 0."""
    format: str = "png"
    """Image format: `png` (lossless), `jpg` or `webp`."""
    quality: int = 95
    """Quality of `jpg` and `webp`, 1..100."""
    upload: str | None = None
    """URL of any file system that fsspec supports (`s3://bucket/folder`, `gs://`, `hf://datasets/owner/name`,
    `file://`): finished shards are uploaded while others are generated. Credentials come from the environment, never
    from the job. null: no upload."""
    key_prefix: str = ""
    """Start of every sample's key, at most 32 of `[A-Za-z0-9_-]`, so that datasets of the same prompts can be combined.
    Seeds and pixels do not depend on it."""
    resume: str = "if_same"
    """`if_same` resumes a dataset of the same job; `never` refuses a directory that contains a dataset."""

    def __post_init__(self) -> None:
        _check(self.samples_per_shard > 0, f"output.samples_per_shard must be > 0, got {self.samples_per_shard}")
        _one_of("output.format", self.format, ("png", "jpg", "webp"))
        _check(1 <= self.quality <= 100, f"output.quality must be in 1..100, got {self.quality}")
        _check(
            self.dir is None or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", self.dir),
            f"output.dir must be a local directory, got {self.dir}; set "
            f"output.upload={re.sub(':/+', '://', self.dir or '')} to upload to it",
        )
        if self.upload is not None:
            check_url("output.upload", self.upload)
        _check(
            re.fullmatch(r"[A-Za-z0-9_-]{0,32}", self.key_prefix) is not None,
            f"output.key_prefix must be at most 32 of [A-Za-z0-9_-], got {self.key_prefix!r}",
        )
        _one_of("output.resume", self.resume, ("if_same", "never"))


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Logging to Weights & Biases."""

    mode: str | None = None
    """`online`, `offline` (log to `wandb/` in the current directory; upload with `wandb sync`) or `disabled`; null:
    the environment variable `WANDB_MODE`, else `offline`."""
    project: str | None = None
    """Name of the W&B project; null: the environment variable `WANDB_PROJECT`, else `madgen`."""
    entity: str | None = None
    """W&B user or team; null: the environment variable `WANDB_ENTITY`, else the account's default."""
    group: str | None = None
    """Group of runs that this run belongs to; null: the environment variable `WANDB_RUN_GROUP`, else none."""
    id: str | None = None
    """Run id; null: the environment variable `WANDB_RUN_ID`, else derived from the dataset's directory, so that a
    resumed run continues the same curve."""

    def __post_init__(self) -> None:
        _check(
            self.mode is None or self.mode in WANDB_MODES,
            f"monitor.wandb.mode must be one of "
            f"{', '.join(WANDB_MODES)}, or null for WANDB_MODE of the environment, got {self.mode!r}",
        )

    def chosen_mode(self, variables: Mapping[str, str] = os.environ) -> str:
        """Return the mode. Raises UserError if `WANDB_MODE` of the environment decides and is invalid."""
        if self.mode is not None:
            return self.mode
        if variables.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "disabled"
        mode = variables.get("WANDB_MODE") or "offline"
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # as W&B names them too
        _one_of("the environment variable WANDB_MODE", mode, WANDB_MODES)
        return mode


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Monitoring of a run."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    preview_every: int = 100
    """Log a preview image to W&B after every `preview_every` samples, >= 0; 0: none."""

    def __post_init__(self) -> None:
        _check(self.preview_every >= 0, f"monitor.preview_every must be >= 0 samples, got {self.preview_every}")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Arguments of `lightning.Trainer`."""

    accelerator: str = "auto"
    """`cpu`, `gpu`, or another accelerator of Lightning; `auto` is the GPU if there is one."""
    devices: Any = "auto"
    """Number of processes on each node, one per device, > 0. `auto` follows `srun` or `torchrun`, or else uses all GPUs
    of this machine."""
    num_nodes: Any = "auto"
    """Number of nodes, > 0. `auto` follows `srun` or `torchrun`; 1 without them."""
    strategy: str = "auto"
    """Strategy of Lightning; `auto` is DDP if there is more than one process."""

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes"):
            value = getattr(self, name)
            _check(
                value == "auto" or (type(value) is int and value > 0),
                f"trainer.{name} must be an integer > 0 or auto, got {value!r}",
            )


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """A safety checker, applied to square crops as large as a view."""

    checker: str | None = None
    """Folder or Hugging Face Hub id of a diffusers `StableDiffusionSafetyChecker` with its feature extractor, or of a
    pipeline that contains them; null: no checker."""
    action: str = "keep"
    """Handling of flagged crops: `keep` only records them, `blur` blurs them, `drop` quarantines the sample. `blur`
    and `drop` need a checker."""

    def __post_init__(self) -> None:
        _one_of("safety.action", self.action, ("keep", "blur", "drop"))
        _check(self.checker != "", "safety.checker is empty; set it to null to disable the checker")
        _check(
            self.checker is not None or self.action == "keep",
            f"safety.action={self.action} has no effect without a checker; set safety.checker",
        )


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores of each sample, recorded in its JSON, the sidecars and `index.parquet`, to select by (`madgen filter`)."""

    enabled: tuple[str, ...] | None = None
    """Scores computed from pixels: `seam` (gradient at the borders of views relative to that beside them; 1 is
    seamless), `wrap` (the same where a looped panorama closes) and `coherence` (similarity of crops, 0..1). null: all
    that apply to the job, at almost no cost; []: none."""
    clip: str | None = None
    """Folder or Hugging Face Hub id of a CLIP model (safetensors) for the score `clip`: 100 times the cosine of prompt
    and image, at least 0, averaged over square crops. Prompts of regions are ignored, and prompts are truncated to the
    model's maximum length. null: no such score."""

    def __post_init__(self) -> None:
        for name in self.enabled or ():
            _check(name != "clip", "scores.enabled: clip needs a model; set scores.clip=FOLDER_OR_ID instead")
            _check(name in PIXEL_SCORES, f"scores.enabled: unknown score {name!r}{nearest(name, PIXEL_SCORES)}")
        _check(len(set(self.enabled or ())) == len(self.enabled or ()), "scores.enabled names a score twice")
        _check(self.clip != "", "scores.clip is empty; set it to null to disable the score")


@dataclass(frozen=True, kw_only=True)
class QuarantineConfig:
    """Limit of failed samples beyond which a run stops, since the job or the machine is probably broken."""

    max_share: float = 0.2
    """Stop if more than this share of the last `window` samples failed, 0..1; 1: never."""
    window: int = 50
    """Number of most recent samples to consider, >= 1."""

    def __post_init__(self) -> None:
        _check(0 <= self.max_share <= 1, f"quarantine.max_share must be in 0..1, got {self.max_share}; 1 disables it")
        _check(self.window >= 1, f"quarantine.window must be >= 1 sample, got {self.window}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job: everything that determines one dataset."""

    name: str = "job"
    """Name of the dataset and prefix of its shards, 1..96 of `[A-Za-z0-9_-]`. If a job file does not set it, it is the
    stem of the (first) job file."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    retry: str | None = None
    """`quarantined` generates samples again that failed in earlier runs; null skips them."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "method", self.method.with_steps(self.sampling.num_inference_steps))
        check_recordable(self.as_dict())
        _check(self.retry in (None, "quarantined"), f"retry must be quarantined or null, got {self.retry!r}")
        valid = all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name)
        _check(valid and 0 < len(self.name) <= 96, f"name must match [A-Za-z0-9_-]{{1,96}}, got {self.name!r}")
        first, steps = self.method.views.overlap_from, self.sampling.num_inference_steps
        _check(
            first is None or first < steps,
            f"method.views.overlap_from={first} must be < sampling.num_inference_steps={steps}; set it to null",
        )
        self.method.merge.check_steps(self.method.mad.merged_steps, steps)
        _check(
            self.sampling.guidance_steps is None or not self.method.sync.weight,
            "method.sync needs guidance in every step; set sampling.guidance_steps to null",
        )
        for name, reason in self._inapplicable_scores.items():
            _check(
                name not in (self.scores.enabled or ()),
                f"scores.enabled: {name} is undefined {reason}; remove it",
            )

    @property
    def _inapplicable_scores(self) -> dict[str, str]:
        """Pixel scores that are undefined for this job, with the reason."""
        seam = {"seam": "with layout=whole, which has no borders"} if self.method.views.layout == "whole" else {}
        return seam if self.sampling.loop else {**seam, "wrap": "without sampling.loop=true"}

    @property
    def pixel_scores(self) -> tuple[str, ...]:
        """Pixel scores that are recorded, in the order of `PIXEL_SCORES`."""
        enabled = PIXEL_SCORES if self.scores.enabled is None else self.scores.enabled
        return tuple(name for name in PIXEL_SCORES if name in enabled and name not in self._inapplicable_scores)

    @property
    def output_dir(self) -> Path:
        """Directory of the dataset."""
        return expand_user(self.output.dir or f"out/{self.name}", "output.dir")

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved job as it is recorded in `dataset.json`."""
        resolved = asdict(self)
        del resolved["method"]["mad"]["share"]  # converted to steps
        return resolved
