"""What flows through madgen, in order: Prompt -> Task -> Shard -> Batch -> Record. All immutable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
    """A picture, white where the region is, of the panorama's aspect ratio."""

    path: str
    sha256: str = ""
    """Of the file, so that a changed mask is another job."""


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """The content of a mask file, as it is recorded with a sample."""

    png: str
    """Base64."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """Prompts that change along the width: the `index`-th of `count` equally spaced ones, blended linearly."""

    index: int
    count: int


Mask = Box | MaskFile | MaskPicture | Ramp


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the panorama with a prompt of its own."""

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
        """Whether it has a mask of its own, unlike a blend along the width, and is bootstrapped."""
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
    """The line's own seed: sample 0 uses it as it is."""
    regions: tuple[Region, ...] = ()
    """Parts with prompts of their own; this prompt is the background."""


@dataclass(frozen=True, slots=True)
class Task:
    """One panorama to make: what was sampled is what is recorded, both come from here."""

    key: str
    """`<prompt_id>-<sample_index:04d>`: the WebDataset key."""
    prompt: Prompt
    sample_index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work, of commit and of resume."""

    index: int
    name: str
    """File stem, e.g. `demo-000042`."""
    tasks: tuple[Task, ...]


def shard_name(job_name: str, index: int) -> str:
    """Return the file stem of a shard, e.g. `demo-000042`."""
    return f"{job_name}-{index:06d}"


@dataclass(frozen=True, slots=True)
class Batch:
    """Panoramas of one size, sampled at once; consecutive tasks of one shard.

    Without tasks the shard is only to be published.
    """

    shard: Shard
    start: int
    """Position of the first task in the shard."""
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of one task: a picture, or why there is none."""

    image_HWC: np.ndarray | None
    """uint8 [H, W, 3]."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What was done otherwise than the job says, or found out: merged into the sample's JSON."""
    reason: str | None = None
    """Why there is no picture, in one word: the sample is quarantined."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Panoramas:
    """Result of sampling one batch."""

    attempts: tuple[Attempt, ...]
    """In the order of the batch's tasks."""
    seconds: dict[str, float]
    """Wall time of `sample`, `decode` and, if the job has a checker or CLIP, `safety` and `score`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One finished panorama on its way into a tar."""

    task: Task
    image_HWC: np.ndarray
    """uint8 [H, W, 3]."""
    metadata: dict[str, Any]
    """The sample's JSON."""
