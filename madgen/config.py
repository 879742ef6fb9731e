"""The job: one YAML file that says what dataset to make. The only module that knows OmegaConf."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from madgen.errors import UserError


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    _check(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")


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

    def __post_init__(self) -> None:
        _one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check(not self.compile, "backbone.compile=true is not supported yet; leave it false")


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
    views that never merge."""

    def __post_init__(self) -> None:
        _one_of("method.views.layout", self.layout, ("overlapping", "shifted", "whole"))
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
    scheduler: str | None = None
    """A diffusers scheduler class; null is the checkpoint's own."""
    original_inference_steps: int | None = None
    """Of consistency models' schedulers: the steps that were distilled; null is what the scheduler's config says."""
    decode: str = "auto"
    """`whole` panoramas at once, `tiled` for less memory (tiles of two views, blended), or `auto`: tiled above 2^22
    pixels."""
    batch_size: int = 1
    """Panoramas at once on a device."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_inference_steps", "batch_size"):
            _check(getattr(self, name) > 0, f"sampling.{name} must be > 0, got {getattr(self, name)}")
        _check(
            0 <= self.guidance_scale < float("inf"), f"sampling.guidance_scale must be >= 0, got {self.guidance_scale}"
        )
        original = self.original_inference_steps
        _check(original is None or original > 0, f"sampling.original_inference_steps must be > 0, got {original}")
        _one_of("sampling.decode", self.decode, ("auto", "whole", "tiled"))


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    source: str = "prompts.txt"
    """`.txt`, `.jsonl` or `.json`; relative to the current directory, else to the job file."""
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
    resume: str = "if_same"
    """`if_same`: go on with a dataset of the same job. `never`: refuse a directory that holds one."""

    def __post_init__(self) -> None:
        _check(self.samples_per_shard > 0, f"output.samples_per_shard must be > 0, got {self.samples_per_shard}")
        _one_of("output.format", self.format, ("png", "jpg", "webp"))
        _check(1 <= self.quality <= 100, f"output.quality must be in 1..100, got {self.quality}")
        _check(self.upload is None, "output.upload is not supported yet; leave it null")
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
class Job:
    """One dataset."""

    name: str = "job"
    """Of the shards; the default is the stem of the (first) job file."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        valid = all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name)
        _check(valid and 0 < len(self.name) <= 96, f"name must match [A-Za-z0-9_-]{{1,96}}, got {self.name!r}")

    @property
    def output_dir(self) -> Path:
        """The dataset's directory."""
        return Path(self.output.dir or f"out/{self.name}").expanduser()

    def as_dict(self) -> dict[str, Any]:
        """The resolved job, as it is recorded in `dataset.json`."""
        return asdict(self)


def load_job(paths: str | Path | Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> Job:
    """Reads job files (later ones win), their `base:` files first, then `key=value` overrides.

    Raises UserError on a missing file, bad YAML, an unknown key (naming the nearest one) or a bad value.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    layers = [OmegaConf.create({"name": files[0].stem if files else "job"})]
    layers += [layer for file in files for layer in _layers(file, ())]
    layers += [_override(text) for text in overrides]
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Job), *layers))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    assert isinstance(job, Job)
    _refuse_converted(OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True), job.as_dict())
    folders = [file.resolve().parent for file in files]
    source = _find(job.prompts.source, folders)
    regions = [_with_mask_found(region, folders) for region in job.prompts.regions]
    return replace(job, prompts=replace(job.prompts, source=source, regions=regions))


def _with_mask_found(region: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    mask = region.get("mask")
    found = Path(_find(mask, folders)) if isinstance(mask, str) else None
    return {**region, "mask": str(found.absolute())} if found is not None and found.exists() else region


def _refuse_converted(given: Any, taken: Any, name: str = "") -> None:
    """YAML reads `no` as false and `007` as 7; where a text is wanted, that is not what was meant."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for key, value in given.items():
            _refuse_converted(value, taken.get(key), f"{name}.{key}" if name else key)
    elif isinstance(given, list) and isinstance(taken, list | tuple):
        for value, final in zip(given, taken, strict=False):
            _refuse_converted(value, final, name)
    elif isinstance(taken, str) and not isinstance(given, str):
        raise UserError(f"{name} must be a text, YAML reads it as {given!r}; put it in quotes")


def _find(source: str, folders: Sequence[Path]) -> str:
    """The path of a prompt file: relative to the current directory, or else to the first job file that has it."""
    path = Path(source).expanduser()
    candidates = [path, *(folder / path for folder in folders)]
    return str(next((candidate for candidate in candidates if candidate.exists()), path))


def _override(text: str) -> DictConfig:
    key, separator, _ = text.partition("=")
    _check(bool(separator and key.strip()), f"an override is key=value, got {text!r}; example: sampling.width=2048")
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"cannot read the override {text!r}: {str(error).splitlines()[0]}") from error


def _layers(path: Path, seen: tuple[Path, ...]) -> list[DictConfig]:
    """The file's bases, depth first, then the file itself."""
    path = path.resolve()
    _check(
        path.suffix.lower() not in (".txt", ".jsonl", ".csv"),
        f"{path} is a prompt file, not a job; give the job, and prompts.source={path}",
    )
    _check(path not in seen, f"{path} is its own base")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"no job file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the job file {path}: {error}") from error
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values at its top level")
    content: Any = OmegaConf.to_container(loaded)
    base = content.pop("base", None) or []
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{path}: base must be a file or a list of files, got {base!r}")
    layers = [layer for name in bases for layer in _layers(path.parent / name, (*seen, path))]
    return [*layers, OmegaConf.create(content)]


def _explain(error: OmegaConfBaseException) -> str:
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    if " is not a subclass of " in first:
        section = first.split(" is not a subclass of ")[1].split(".")[0]
        name = section.removesuffix("Config").lower()
        return f"{name} holds keys of its own, such as {name}.{_first_key(name)}; got a plain value"
    if "is not a TupleConfig, ListConfig" in first or "is not a ListConfig" in first:
        return f"{key} is a list: write {key}=[...], such as method.mad.blocks=[up]"
    if key and "not in" in first:
        return f"unknown key {key!r}{_nearest(str(key), _known_keys(Job()))}"
    return f"{key}: {first}" if key else first


def _first_key(section: str) -> str:
    known = _known_keys(Job(name="job"))
    return next((name.rpartition(".")[2] for name in known if f"{section}." in name), "key")


def _nearest(key: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], [name.rpartition(".")[2] for name in known], n=1)
    if not close and leaf:
        close = [name for name in known if name.rpartition(".")[2] == leaf[0]][:1]
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(k for k in known if '.' not in k)}"


def _known_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(config):
        keys.append(prefix + item.name)
        value = getattr(config, item.name)
        if is_dataclass(value):
            keys.extend(_known_keys(value, f"{prefix}{item.name}."))
    return keys
