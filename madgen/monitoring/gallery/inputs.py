"""Find the pictures that samples started from, if they are still where the prompts name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_metadata
from madgen.images.pictures import read_picture
from madgen.prompts.recorded_pictures import find_pictures
from madgen.types import PictureFile
from madgen.utils.errors import UserError


def find_inputs(dataset: DatasetDir, shown: Sequence[SampleEntry]) -> Mapping[str, PictureFile]:
    """Return the available pictures that the samples started from, by checksum; none if the job starts from noise."""
    job = dataset.read_manifest().job
    if ((job.get("sampling") or {}).get("init") or {}).get("strength") is None:
        return {}
    wanted: dict[str, set[str]] = {}
    for entry in shown:
        metadata = read_metadata(dataset, entry)
        if "image" in metadata.get("pictures", {}):
            wanted.setdefault(metadata["prompt"], set()).add(metadata["pictures"]["image"])
    return find_pictures(job["prompts"], ["image"], wanted)


def load_input(picture: PictureFile) -> Image.Image | None:
    """Return a picture to be scaled down; None if it cannot be read any more."""
    try:
        return read_picture(picture).copy()
    except UserError:
        return None
