"""Sample a panorama of a dataset again from its JSON, and compare the pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from madgen.config.schema import IpAdapterConfig, SafetyConfig
from madgen.dataset.encoding import encode_image
from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_sample
from madgen.dataset.sample_json import SampleInputs, adapter_config, recorded_inputs, with_locations
from madgen.generation.environment import describe, environment
from madgen.generation.quiet import quieten
from madgen.generation.safety import Safety
from madgen.generation.sample import sample_image
from madgen.generation.single_image import check_output
from madgen.hub.adapters import controlnet_id, ip_adapter_files, ip_adapter_id, lora_id
from madgen.hub.auxiliary_models import checker_id
from madgen.hub.model_configs import described_by
from madgen.hub.weights import ModelFiles, weights_id
from madgen.prompts.picture_files import ANYWHERE, parse_picture
from madgen.prompts.recorded_pictures import find_pictures
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import PictureFile
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

SAME, OTHER_PICTURE, LAST_BITS = 0, 1, 5
"""Results of `regenerate`, which are its exit statuses."""
MAX_DIFFERENCE, MEAN_DIFFERENCE = 8, 0.5
"""Levels, of 255, by which pixels may differ if only the last bits of the computation do."""


def regenerate(
    directory: Path,
    key: str,
    output: Path,
    pretrained: str | None = None,
    files: Mapping[str, str] | None = None,
) -> int:
    """Write the image to `output` and print how it compares; return `SAME`, `LAST_BITS` or `OTHER_PICTURE`.

    The backbone is loaded from `pretrained`, by default the location in `dataset.json`, and pictures from `files`, by
    column (`image`, `mask`), by default those that the job's prompts name.
    JPEG and WebP are compared after the same encoding. The last bits depend on the `Environment`.
    """
    image_format = check_output(output)
    quieten()
    stored = read_sample(DatasetDir(directory), key)
    stored_HWC = stored.image_HWC  # raises for a damaged image before the models are loaded
    manifest = DatasetDir(directory).read_manifest().source_of(stored.metadata.get("fingerprint"))
    quality = manifest.setting("job.output.quality", int)
    try:
        metadata = with_locations(stored.metadata, manifest, pretrained)
        _check_weights(metadata)
        pictures = _find_pictures(metadata, manifest, files or {})
        inputs, loop = recorded_inputs(metadata, pictures), bool(metadata["sampling"]["loop"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"the JSON of sample {key} is damaged: {error!r:.100}"
        raise UserError(f"{problem}; run madgen verify {directory}") from error
    image = _checked(*_sample(inputs, metadata), metadata)
    write_atomically(output, encode_image(image, image_format, 95, loop, stored.metadata))
    decoded = _decode(encode_image(image, stored.format, quality))
    difference = np.abs(decoded.astype(int) - stored_HWC.astype(int))
    status = _compare(difference)
    differs = f"differs by at most {difference.max()} of 255, by {difference.mean():.4f} on average"
    verdict = {SAME: "the same pixels", LAST_BITS: f"only the last bits: {differs}", OTHER_PICTURE: differs}
    print(f"{output}: {key}, {verdict[status]}")
    if status != SAME:
        _print_environments(DatasetDir(directory), key)
    return status


def _compare(difference_HWC: np.ndarray) -> int:
    if not difference_HWC.any():
        return SAME
    small = difference_HWC.max() <= MAX_DIFFERENCE and difference_HWC.mean() <= MEAN_DIFFERENCE
    return LAST_BITS if small else OTHER_PICTURE


def _print_environments(directory: DatasetDir, key: str) -> None:
    """Print what the last bits depend on, for the dataset and for this process."""
    shards = (entry.shard for entry in directory.entries() if entry.key == key)
    recorded = directory.read_sidecar(next(shards)).environment
    now = environment("cuda" if torch.cuda.is_available() else "cpu", 1)
    made = "in an environment that was not recorded" if recorded is None else f"with {describe(recorded)}"
    print(f"made {made}\nnow  with {describe(now)}")
    print("the last bits depend on these; for the same threads, set OMP_NUM_THREADS")


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _check_weights(metadata: dict[str, Any]) -> None:
    """Raise UserError if the weights on this machine are not those of the sample."""
    backbone, safety = metadata["backbone"], metadata.get("safety")
    pretrained, revision, config = backbone["pretrained"], backbone["revision"], backbone["config"]
    local = weights_id(pretrained, revision, config or described_by(ModelFiles(pretrained, revision)))
    _check_same(pretrained, local, backbone["weights"])
    for lora in backbone["loras"]:
        _check_same(lora["weights"], lora_id(lora["weights"]), lora["id"])
    if control := backbone.get("controlnet"):
        _check_same(control["weights"], controlnet_id(control["weights"]), control["id"])
    if adapter := backbone.get("ip_adapter"):
        files = ip_adapter_files(adapter_config(IpAdapterConfig, adapter))
        _check_same(adapter["weights"], files and ip_adapter_id(files), adapter["id"])
    if safety is not None:
        _check_same(safety["checker"], checker_id(safety["checker"]), safety["weights"])


def _find_pictures(metadata: dict[str, Any], manifest: Manifest, files: Mapping[str, str]) -> dict[str, PictureFile]:
    """Return the pictures that a sample started from: `files` by column, or those that the job's prompts name.

    Raises UserError for a picture that is missing, or has other content.
    """
    recorded: dict[str, str] = metadata.get("pictures", {})
    unused = next((name for name in files if name not in recorded), None)
    if unused is not None:
        raise UserError(f"--{unused}={files[unused]} has no effect: the sample used no such picture; leave it out")
    pictures = {name: parse_picture(f"--{name}", name, file, ANYWHERE) for name, file in files.items()}
    missing = {name: checksum for name, checksum in recorded.items() if name not in pictures}
    if missing:
        wanted = {metadata["prompt"]: set(missing.values())}
        available = find_pictures(manifest.setting("job.prompts", dict), list(missing), wanted)
        pictures |= {name: available[checksum] for name, checksum in missing.items() if checksum in available}
    for name, checksum in recorded.items():
        if name not in pictures:
            raise UserError(
                f"the {name} of the sample (sha256 {checksum[:12]}...) is no longer where its prompt names it; "
                f"pass --{name} FILE"
            )
        if pictures[name].sha256 != checksum:
            raise UserError(
                f"--{name}={pictures[name].path} has other content (sha256 {pictures[name].sha256[:12]}...) than "
                f"the {name} of the sample ({checksum[:12]}...)"
            )
    return pictures


def _sample(inputs: SampleInputs, metadata: dict[str, Any]) -> tuple[np.ndarray, PanoramaSampler]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = PanoramaSampler.from_configs(inputs.backbone, inputs.method, inputs.params, device)
    with sampler.backbone.in_float32() if metadata["backbone"]["dtype"] == "float32" else nullcontext():
        return sample_image(sampler, inputs.task), sampler


def _checked(image_HWC: np.ndarray, sampler: PanoramaSampler, metadata: dict[str, Any]) -> np.ndarray:
    """Apply the safety checker if the sample was generated with one."""
    recorded = metadata.get("safety")
    if recorded is None:
        return image_HWC
    safety = Safety.load(SafetyConfig(checker=recorded["checker"], action=recorded["action"]), sampler)
    assert safety is not None
    checked = safety(image_HWC)
    if checked.flagged != recorded["flagged"]:
        print(f"the safety checker flags {checked.flagged} now, and flagged {recorded['flagged']} in the dataset")
    return checked.image_HWC


def _check_same(source: str, local: str | None, recorded: str) -> None:
    if local != recorded:
        raise UserError(f"{source}: the weights on this machine ({local}) are not those of the sample ({recorded})")
