"""The job: what one YAML file may say. Every value is refused at birth, with a way out; see `madgen.config.loader`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from madgen.utils.errors import UserError

PROMPT_FIELDS = ("id", "prompt", "negative_prompt", "width", "height", "seed", "regions", "across")
"""What a line of a prompt file may say."""
PIXEL_SCORES = ("seam", "wrap", "coherence")
"""Of `madgen.images.scores`."""
AUTO_BATCH = "auto"
"""The value of `sampling.batch_size` that stands for as many as keep the device busy."""
SCORES = (*PIXEL_SCORES, "clip")
"""What the JSON of a sample may hold under `scores`."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    _check(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")


def nearest(name: str, known: Sequence[str]) -> str:
    """What to say after an unknown name: the nearest known one, or else all of them."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def require_job(value: Any) -> Job:
    """The value, or UserError for what is no job, such as the path of one."""
    _check(isinstance(value, Job), f"need a madgen.Job, as load_job(path) gives it, got {value!r}")
    return value


def check_url(name: str, url: str) -> None:
    """UserError for what is no URL of a folder, or might hold a secret, which is not shown then."""
    protocol, separator, rest = url.partition("://")
    _check(
        ":" not in (rest if separator else url).rpartition("@")[0] and "?" not in url and "#" not in url,
        f"{name} must hold no password, key or query: it is written into files; keys come from the environment",
    )
    _check(
        re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) is not None and rest.strip("/") != "" and url.isprintable(),
        f"{name} must be a URL such as s3://bucket/folder or file:///a/folder, got {url!r}",
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    weights: str
    """A `.safetensors` file, a folder that holds one, or a Hugging Face hub id."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self.weights != "", "backbone.loras: weights is empty")
        _check(abs(self.scale) < float("inf"), f"backbone.loras: scale must be a finite number, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    name: str = "sd"
    """The module of `madgen/backbones/` that loads it."""
    pretrained: str = "demo"
    """`demo`, a diffusers folder, a Hugging Face hub id, or one `.safetensors` file in the original layout."""
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    """For a single file: the folder or hub id with the pipeline's config files and tokenizers; null is what diffusers
    infers from the file, which needs the hub or its cache."""
    loras: list[LoraConfig] = field(default_factory=list)  # OmegaConf leaves the items of a tuple unchecked
    """Fused into the weights, each times its scale."""
    dtype: str = "auto"
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    compile: bool = False
    """`torch.compile` UNet and decoder: faster, after some minutes for each size of panorama; last bits change."""
    cuda_graphs: bool = True
    """On an NVIDIA GPU: a pass over few views (up to 32 of 64x64 cells, with guidance) is launched at once, which is
    faster and keeps its memory; the pictures stay the same."""

    def __post_init__(self) -> None:
        _one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    layout: str = "overlapping"
    """`overlapping` (MultiDiffusion), `shifted` (SpotDiffusion: side by side, moved at each step, by another multiple
    of the stride while attention merges, by any number of cells where it does not), or `whole` (direct inference: one
    view that is the canvas)."""
    size: int | None = None
    """Latent cells; null is the size that the backbone was trained at."""
    stride: int | None = None
    """Latent cells; null is a quarter of the size. Has no meaning, and must be null, with `whole`, and with `shifted`
    views that never merge or overlap."""
    overlap_from: int | None = None
    """Of `shifted`: views overlap, every `stride` cells, from this step on (the first is 0), which blends the last
    borders; null: in no step."""

    def __post_init__(self) -> None:
        _one_of("method.views.layout", self.layout, ("overlapping", "shifted", "whole"))
        first = self.overlap_from
        _check(
            first is None or (first >= 0 and self.layout == "shifted"),
            f"method.views.overlap_from is a step >= 0 of layout=shifted, got {first} with layout={self.layout}; "
            "leave it null",
        )
        for name in ("size", "stride"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"method.views.{name} must be > 0 latent cells, got {value}")


@dataclass(frozen=True, kw_only=True)
class MadConfig:
    steps: int = 15
    """Merge attention in the first `steps` steps (the paper's tau); 0 is plain MultiDiffusion, unless
    `cross_attention` is `always`."""
    blocks: tuple[str, ...] = ("down", "mid", "up")
    """Where: `down`, `mid`, `up`, or patterns of layer names such as `up_blocks.1.*attn1*`."""
    cross_attention: str = "scheduled"
    """`scheduled` as in the paper, or `always` merged as in the released code, also after `steps`."""

    def __post_init__(self) -> None:
        _check(self.steps >= 0, f"method.mad.steps must be >= 0, got {self.steps}; 0 gives plain MultiDiffusion")
        _one_of("method.mad.cross_attention", self.cross_attention, ("scheduled", "always"))
        _check(len(self.blocks) > 0, "method.mad.blocks is empty; steps=0 switches MAD off")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """SyncDiffusion: views are pulled towards the look of the middle one, `weight * decay ** step` strong."""

    weight: float = 0.0
    """0: off; the paper takes 20."""
    decay: float = 0.95
    steps: int = 50
    """Only in the first `steps` steps."""
    every: int = 1
    """Only at each `every`-th step."""
    network: str = "vgg"
    """What LPIPS compares with: `vgg`, trained on ImageNet, or `random`, untrained, which needs no download."""

    def __post_init__(self) -> None:
        _check(0 <= self.weight < float("inf"), f"method.sync.weight must be >= 0, got {self.weight}; 0 is off")
        _check(0 < self.decay <= 1, f"method.sync.decay must be in 0..1 and not 0, got {self.decay}; 1 is no decay")
        _check(self.steps >= 0, f"method.sync.steps must be >= 0, got {self.steps}")
        _check(
            self.steps > 0 or self.weight == 0,
            f"method.sync.steps=0 leaves method.sync.weight={self.weight:g} without effect; set the weight 0",
        )
        _check(self.every >= 1, f"method.sync.every must be >= 1 step, got {self.every}; 1 is at each step")
        _one_of("method.sync.network", self.network, ("vgg", "random"))


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    bootstrapping: int | None = None
    """In the first `bootstrapping` steps a region's prompt sees plain colours outside its mask; 0: never; null: in two
    fifths of the steps, as the released code."""

    def __post_init__(self) -> None:
        _check(
            self.bootstrapping is None or self.bootstrapping >= 0,
            f"method.regions.bootstrapping must be >= 0 steps or null, got {self.bootstrapping}",
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    views: ViewsConfig = field(default_factory=ViewsConfig)
    mad: MadConfig = field(default_factory=MadConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        _check(
            not (self.sync.weight and self.views.layout == "whole"),
            "method.sync compares views, and layout=whole has only one; leave method.sync.weight 0",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    height: int = 512
    """Pixels; a prompt line may say otherwise."""
    width: int = 3072
    """Pixels; a prompt line may say otherwise."""
    loop: bool = False
    """360 degrees: the left edge meets the right one, in views, in attention and in decoding."""
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_steps: tuple[int, ...] | None = None
    """`[first, end]`: classifier-free guidance in these steps only, `end` not among them; the others take one UNet
    pass instead of two (Kynkäänniemi et al., 2024). Null: in all of them."""
    scheduler: str | None = None
    """A diffusers scheduler class; null is the checkpoint's own."""
    original_inference_steps: int | None = None
    """Of consistency models' schedulers: the steps that were distilled; null is what the scheduler's config says."""
    decode: str = "auto"
    """`whole` panoramas at once, `tiled` for less memory (tiles of two views, blended), or `auto`: tiled above 2^22
    pixels."""
    batch_size: Any = 1
    """Panoramas at once on a device, of prompts of one size in a row. `auto`: on an NVIDIA GPU as many as keep it busy,
    on other devices one. Where memory runs out, fewer are sampled at a time. The last bits of a picture may depend on
    it."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_inference_steps"):
            _check(getattr(self, name) > 0, f"sampling.{name} must be > 0, got {getattr(self, name)}")
        size = self.batch_size
        _check(
            size == AUTO_BATCH or (type(size) is int and size > 0),
            f"sampling.batch_size must be a number > 0 or auto, got {size!r}",
        )
        _check(
            self.num_inference_steps <= 10_000,
            f"sampling.num_inference_steps must be <= 10000, got {self.num_inference_steps}",
        )
        _check(
            0 <= self.guidance_scale < float("inf"), f"sampling.guidance_scale must be >= 0, got {self.guidance_scale}"
        )
        self._check_guidance_steps()
        original = self.original_inference_steps
        _check(original is None or original > 0, f"sampling.original_inference_steps must be > 0, got {original}")
        _one_of("sampling.decode", self.decode, ("auto", "whole", "tiled"))

    def _check_guidance_steps(self) -> None:
        if self.guidance_steps is None:
            return
        _check(
            len(self.guidance_steps) == 2
            and 0 <= self.guidance_steps[0] < self.guidance_steps[1] <= self.num_inference_steps,
            f"sampling.guidance_steps must be [first, end] with 0 <= first < end <= num_inference_steps="
            f"{self.num_inference_steps}, got {list(self.guidance_steps)}; null is all steps",
        )
        _check(
            self.guidance_scale > 1,
            f"sampling.guidance_steps has no effect with guidance_scale={self.guidance_scale} <= 1; leave it null",
        )


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    source: str = "prompts.txt"
    """A `.txt`, `.jsonl`, `.json`, `.csv` (each also with `.gz` behind it) or `.parquet`, or many of them by a pattern
    such as `prompts/**/*.jsonl`, in the order of their paths; relative to the current directory, else to the job file.
    Or a Hugging Face dataset: `hf://owner/name`, `hf://owner/name/config`, or `hf:///a/folder` on this machine."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column (or JSON key) of the source is which of `id`, `prompt`, `negative_prompt`, `width`, `height`,
    `seed`, `regions`, `across`, as `{prompt: caption}`: only these are read. Empty: they have these names, and others
    are refused."""
    negative_prompt: str = ""
    samples_per_prompt: int = 1
    limit: int | None = None
    """Only the first `limit` prompts."""
    seed: int = 0
    on_duplicate: str = "error"
    """Two prompts of one id: `error`, `skip` the later ones, or `rename` them."""
    regions: list[dict[str, Any]] = field(default_factory=list)
    """For lines without their own: `{mask, prompt, negative_prompt}`; a mask is `[left, top, right, bottom]` in pixels,
    or a picture file, white where the region is, found as `source` is. A region without a negative prompt takes the
    line's."""
    across: list[str] = field(default_factory=list)
    """For lines without their own: further prompts, spaced along the width, from the line's own at the left edge."""

    def __post_init__(self) -> None:
        _check(
            1 <= self.samples_per_prompt <= 10_000,
            f"prompts.samples_per_prompt must be in 1..10000, got {self.samples_per_prompt}",
        )
        _check(0 <= self.seed < 2**63, f"prompts.seed must be in 0..2^63-1, got {self.seed}")
        _check(not (self.regions and self.across), "prompts.regions and prompts.across exclude each other; give one")
        _check(self.limit is None or self.limit > 0, f"prompts.limit must be > 0 prompts or null, got {self.limit}")
        _check(self.split != "", "prompts.split is empty; the default is train")
        for ours, theirs in self.columns.items():
            _one_of("a key of prompts.columns", ours, PROMPT_FIELDS)
            _check(theirs != "", f"prompts.columns.{ours} is empty; name a column of prompts.source")
        _check(
            not self.columns or "prompt" in self.columns,
            "prompts.columns must say which column holds the prompt: prompts.columns.prompt=...",
        )
        _check(
            len(set(self.columns.values())) == len(self.columns),
            f"prompts.columns names a column twice: {', '.join(self.columns.values())}",
        )
        _one_of("prompts.on_duplicate", self.on_duplicate, ("error", "skip", "rename"))


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    dir: str | None = None
    """Relative to the current directory; null is `out/<name>`."""
    samples_per_shard: int = 128
    format: str = "png"
    """`png` (lossless), `jpg` or `webp`."""
    quality: int = 95
    """Of `jpg` and `webp`, 1..100."""
    upload: str | None = None
    """A URL of any file system that fsspec knows (`s3://bucket/folder`, `gs://`, `hf://datasets/owner/name`, `file://`):
    every finished shard is sent there while others are made. Keys come from the environment, never from the job."""
    resume: str = "if_same"
    """`if_same`: go on with a dataset of the same job. `never`: refuse a directory that holds one."""

    def __post_init__(self) -> None:
        _check(self.samples_per_shard > 0, f"output.samples_per_shard must be > 0, got {self.samples_per_shard}")
        _one_of("output.format", self.format, ("png", "jpg", "webp"))
        _check(1 <= self.quality <= 100, f"output.quality must be in 1..100, got {self.quality}")
        if self.upload is not None:
            check_url("output.upload", self.upload)
        _one_of("output.resume", self.resume, ("if_same", "never"))


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: str = "offline"
    project: str = "madgen"
    entity: str | None = None
    group: str | None = None
    id: str | None = None
    """Null: made of the dataset's directory, so that a resumed run goes on."""

    def __post_init__(self) -> None:
        _one_of("monitor.wandb.mode", self.mode, ("online", "offline", "disabled"))


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    preview_every: int = 100
    """A preview picture in W&B every so many samples; 0: none."""

    def __post_init__(self) -> None:
        _check(self.preview_every >= 0, f"monitor.preview_every must be >= 0 samples, got {self.preview_every}")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Handed to `lightning.Trainer`."""

    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: Any = "auto"
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes"):
            value = getattr(self, name)
            _check(
                value == "auto" or (type(value) is int and value > 0),
                f"trainer.{name} must be a number > 0 or auto, got {value!r}",
            )


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Pictures are shown to a safety checker, in crops of a view's size."""

    checker: str | None = None
    """A folder or Hugging Face hub id with diffusers' `StableDiffusionSafetyChecker` and its feature extractor, or with
    a pipeline that has them; null: none."""
    action: str = "keep"
    """What becomes of flagged crops: `keep` only records them, `blur` blurs them, `drop` quarantines the sample."""

    def __post_init__(self) -> None:
        _one_of("safety.action", self.action, ("keep", "blur", "drop"))
        _check(self.checker != "", "safety.checker is empty; null switches it off")
        _check(
            self.checker is not None or self.action == "keep",
            f"safety.action={self.action} has no effect without a checker; set safety.checker",
        )


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Numbers in each sample's JSON, in the sidecars and in `index.parquet`, to choose by: see `madgen filter`."""

    enabled: tuple[str, ...] | None = None
    """Scores of the pixels, see `madgen.images.scores`: `seam` (steps at the views' borders, 1 is seamless), `wrap`
    (the same where a looped panorama closes) and `coherence` (how alike the crops are, 0..1). null: all that
    have a meaning for the job, since they cost next to nothing and cannot be had later without touching the tars;
    []: none."""
    clip: str | None = None
    """A folder or Hugging Face hub id of a CLIP model (safetensors): `clip`, how well the panorama shows its prompt, is
    100 times the cosine of text and picture, at least 0, mean over square crops. A panorama's regions do not count, and
    no more of its prompt than the model's tokenizer takes. null: none."""

    def __post_init__(self) -> None:
        for name in self.enabled or ():
            _check(name != "clip", "scores.enabled: clip needs a model, which switches it on: scores.clip=FOLDER_OR_ID")
            _check(name in PIXEL_SCORES, f"scores.enabled: unknown score {name!r}{nearest(name, PIXEL_SCORES)}")
        _check(len(set(self.enabled or ())) == len(self.enabled or ()), "scores.enabled names a score twice")
        _check(self.clip != "", "scores.clip is empty; null switches it off")


@dataclass(frozen=True, kw_only=True)
class QuarantineConfig:
    """When too many samples fail, something is wrong with the job or the machine, and the run stops."""

    max_share: float = 0.2
    """Stop when more than this share of the last samples failed; 1: never."""
    window: int = 50
    """How many samples are looked back at."""

    def __post_init__(self) -> None:
        _check(0 <= self.max_share <= 1, f"quarantine.max_share must be in 0..1, got {self.max_share}; 1 is off")
        _check(self.window >= 1, f"quarantine.window must be >= 1 sample, got {self.window}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One dataset."""

    name: str = "job"
    """Of the shards; the default is the stem of the (first) job file."""
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
    """`quarantined`: try again what could not be made before; null leaves it out."""

    def __post_init__(self) -> None:
        _check(self.retry in (None, "quarantined"), f"retry must be quarantined or null, got {self.retry!r}")
        valid = all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name)
        _check(valid and 0 < len(self.name) <= 96, f"name must match [A-Za-z0-9_-]{{1,96}}, got {self.name!r}")
        first, steps = self.method.views.overlap_from, self.sampling.num_inference_steps
        _check(
            first is None or first < steps,
            f"method.views.overlap_from={first} is beyond the last of sampling.num_inference_steps={steps} steps; "
            "leave it null",
        )
        _check(
            self.sampling.guidance_steps is None or not self.method.sync.weight,
            "method.sync foresees pictures with guidance at every step; leave sampling.guidance_steps null",
        )
        meaningless = {name: why for name, why in self._without_meaning.items() if name in (self.scores.enabled or ())}
        for name, why in meaningless.items():
            raise UserError(f"scores.enabled: {name} has no meaning {why}; leave it out")

    @property
    def _without_meaning(self) -> dict[str, str]:
        """Scores that no picture of this job can have, and why."""
        seam = {"seam": "with layout=whole, which has no borders"} if self.method.views.layout == "whole" else {}
        return seam if self.sampling.loop else {**seam, "wrap": "without sampling.loop=true"}

    @property
    def pixel_scores(self) -> tuple[str, ...]:
        """The scores of the pixels that are recorded, in the order of `PIXEL_SCORES`."""
        wanted = PIXEL_SCORES if self.scores.enabled is None else self.scores.enabled
        return tuple(name for name in PIXEL_SCORES if name in wanted and name not in self._without_meaning)

    @property
    def output_dir(self) -> Path:
        """The dataset's directory."""
        return Path(self.output.dir or f"out/{self.name}").expanduser()

    def as_dict(self) -> dict[str, Any]:
        """The resolved job, as it is recorded in `dataset.json`."""
        return asdict(self)
