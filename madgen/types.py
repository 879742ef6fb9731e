"""Immutable records of the pipeline, in order: Prompt -> Task -> Shard -> Batch -> Record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the panorama, in pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, slots=True)
class MaskFile:
    """An image file with the panorama's aspect ratio that is white inside the region."""

    path: str
    sha256: str = ""
    """Checksum of the file, so that a changed mask changes the job's fingerprint."""


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """The content of a mask file, as recorded in a sample's JSON."""

    png: str
    """Base64-encoded PNG."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """Position `index` of a prompt among `count` equally spaced ones, blended linearly along the width."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture that a prompt names, such as the one to start from. It is identified by its content."""

    path: str
    """The file, or the tar file that contains it."""
    sha256: str
    """Checksum of the content."""
    height: int
    """Pixels, as `width`, upright."""
    width: int
    span: tuple[int, int] | None = None
    """Offset and size of the content in a tar file; None: it is the whole file."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of this picture."""
        return asdict(self) if self.span else {name: value for name, value in asdict(self).items() if name != "span"}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> PictureFile:
        """Invert `as_dict`."""
        span = value.get("span")
        return cls(**{**value, "span": span and tuple(span)})


Mask = Box | MaskFile | MaskPicture | Ramp


@dataclass(frozen=True, slots=True)
class Region:
    """A region of the panorama with a separate prompt."""

    mask: Mask
    text: str
    negative: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of this region."""
        mask: Any = self.mask
        if isinstance(mask, Box):
            mask = [mask.left, mask.top, mask.right, mask.bottom]
        elif isinstance(mask, Ramp):
            mask = {"ramp": [mask.index, mask.count]}
        else:
            mask = asdict(mask)
        return {"mask": mask, "prompt": self.text, "negative_prompt": self.negative}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Region:
        """Invert `as_dict`."""
        content = value["mask"]
        mask: Mask
        if isinstance(content, list):
            mask = Box(*content)
        elif "ramp" in content:
            mask = Ramp(*content["ramp"])
        else:
            mask = MaskPicture(**content) if "png" in content else MaskFile(**content)
        return cls(mask, value["prompt"], value["negative_prompt"])

    @property
    def is_cut_out(self) -> bool:
        """Return whether the region has a mask and is bootstrapped, in contrast to a blend along the width."""
        return not isinstance(self.mask, Ramp)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file."""

    id: str
    """`[A-Za-z0-9_-]{1,96}`, unique in the dataset."""
    text: str
    negative: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    seed: int | None = None
    """Seed given in the prompt file; sample 0 uses it unchanged."""
    regions: tuple[Region, ...] = ()
    """Regions with separate prompts; this prompt is the background."""

    def texts(self, negatives: bool) -> list[str]:
        """Return the prompts of the panorama and its regions, with their negative prompts if `negatives`."""
        parts = [(self.text, self.negative), *((region.text, region.negative) for region in self.regions)]
        return [text for prompt, negative in parts for text in ((prompt, negative) if negatives else (prompt,))]

    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further columns of the prompt file that the dataset keeps, JSON values by name."""
    pictures: Mapping[str, PictureFile] = field(default_factory=dict, hash=False)
    """Pictures by column: `image` to start from, `mask` (white where it is kept)."""
    place: tuple[int, int] | None = None
    """Left and top pixel of `image` on the panorama; None: it is the whole panorama."""

    @property
    def keeps_pixels(self) -> bool:
        """Return whether a part of `image` is kept as it is."""
        return "mask" in self.pictures or self.place is not None


@dataclass(frozen=True, slots=True)
class NoiseBlend:
    """Interpolation of a sample's initial noise towards that of a second seed; see `method.noise.blend` of the job."""

    seed: int
    share: float


def sample_key(prefix: str, prompt_id: str, sample_index: int) -> str:
    """Return the WebDataset key of a sample; `prefix` is `output.key_prefix`."""
    return f"{prefix}{prompt_id}-{sample_index:04d}"


@dataclass(frozen=True, slots=True)
class Task:
    """A panorama to sample. Both sampling and the sample's JSON read their values from here."""

    key: str
    """The WebDataset key, see `sample_key`."""
    prompt: Prompt
    sample_index: int
    seed: int
    blend: NoiseBlend | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work, commit and resume."""

    index: int
    name: str
    """File stem, e.g. `demo-000042`."""
    tasks: tuple[Task, ...]


def shard_name(job_name: str, index: int) -> str:
    """Return the file stem of a shard, e.g. `demo-000042`."""
    return f"{job_name}-{index:06d}"


def shard_index(name: str) -> int:
    """Invert `shard_name`."""
    return int(name.rpartition("-")[2])


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive tasks of one shard and size that are sampled together.

    A batch without tasks only publishes its shard.
    """

    shard: Shard
    start: int
    """Position of the first task in the shard."""
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """The result of one task: an image, or the reason for its failure."""

    image_HWC: np.ndarray | None
    """uint8 [H, W, 3]."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Deviations from the job and additional results, merged into the sample's JSON."""
    reason: str | None = None
    """Identifier of the failure, such as `out_of_memory`; the sample is quarantined. None: success."""
    detail: str = ""


class Panoramas:
    """The result of sampling one batch: what `trainer.predict` returns and passes to callbacks.

    Not a dataclass: Lightning would take it apart to move its fields between devices.
    """

    def __init__(
        self,
        attempts: tuple[Attempt, ...],
        seconds: dict[str, float],
        tasks: tuple[Task, ...] = (),
        shard: str | None = None,
    ):
        self.attempts = attempts
        """One for each task of the batch, in order."""
        self.seconds = seconds
        """Wall time of `sample`, `decode` and, if the job has a checker or CLIP, `safety` and `score`."""
        self.tasks = tasks
        self.shard = shard
        """Path of the tar file that holds the samples once it is complete; None without a ShardWriter."""

    @property
    def keys(self) -> list[str]:
        """Keys of the samples."""
        return [task.key for task in self.tasks]

    @property
    def prompts(self) -> list[str]:
        """Prompts of the samples."""
        return [task.prompt.text for task in self.tasks]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the samples."""
        return [task.seed for task in self.tasks]

    @property
    def images(self) -> list[np.ndarray | None]:
        """Images, uint8 [H, W, 3]; None for failed samples, and once a ShardWriter has taken over the image."""
        return [attempt.image_HWC for attempt in self.attempts]

    def without_images(self) -> None:
        """Drop the images, so that predictions that are kept take no memory."""
        self.attempts = tuple(replace(attempt, image_HWC=None) for attempt in self.attempts)

    def __repr__(self) -> str:
        return f"Panoramas(keys={self.keys}, shard={self.shard!r})"


@dataclass(frozen=True, slots=True)
class Record:
    """A finished panorama to be written to a shard."""

    task: Task
    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    metadata: dict[str, Any]
    """The sample's JSON."""
