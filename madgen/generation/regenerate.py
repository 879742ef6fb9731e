"""Makes one sample of a dataset again from its own JSON and compares."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from madgen.config.schema import (
    BackboneConfig,
    LoraConfig,
    MadConfig,
    MethodConfig,
    RegionsConfig,
    SafetyConfig,
    SyncConfig,
    ViewsConfig,
)
from madgen.dataset.encoding import encode_image
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_sample
from madgen.generation.safety import Safety
from madgen.generation.sample import check_output
from madgen.hub.model_configs import described_by
from madgen.hub.weights import checker_id, lora_id, weights_id
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Region
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError


def regenerate(directory: Path, key: str, output: Path) -> bool:
    """Writes the picture to `output`, prints how it compares; True if its pixels are the dataset's.

    JPEG and WebP are compared after the same encoding. Another device or batch size may differ in the last bit.
    """
    from madgen.generation.run import quieten  # which brings Lightning

    image_format = check_output(output)
    quieten()
    stored = read_sample(DatasetDir(directory), key)
    _refuse_other_weights(stored.metadata)
    again = _checked(*_sample(stored.metadata), stored.metadata)
    write_atomically(
        output, encode_image(again, image_format, 95, stored.metadata["sampling"]["loop"], stored.metadata)
    )
    job = DatasetDir(directory).read_manifest().job
    decoded = _decode(encode_image(again, stored.format, job["output"]["quality"]))
    difference = np.abs(decoded.astype(int) - stored.image_HWC.astype(int))
    same = not difference.any()
    verdict = f"differs by at most {difference.max()} of 255, by {difference.mean():.4f} on average"
    print(f"{output}: {key}, {'the same pixels' if same else verdict}")
    if not same:
        print("the last bits depend on the device, the number of threads (OMP_NUM_THREADS) and the batch size")
    return same


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _refuse_other_weights(metadata: dict[str, Any]) -> None:
    backbone, safety = metadata["backbone"], metadata.get("safety")
    pretrained, revision, config = backbone["pretrained"], backbone["revision"], backbone["config"]
    here = weights_id(pretrained, revision, config or described_by(pretrained, revision))
    _check_same(backbone["pretrained"], here, backbone["weights"])
    for lora in backbone["loras"]:
        _check_same(lora["weights"], lora_id(lora["weights"]), lora["id"])
    if safety is not None:
        _check_same(safety["checker"], checker_id(safety["checker"]), safety["weights"])


def _sample(metadata: dict[str, Any]) -> tuple[np.ndarray, PanoramaSampler]:
    backbone, method, sampling = metadata["backbone"], metadata["method"], metadata["sampling"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = PanoramaSampler.from_configs(
        BackboneConfig(
            name=backbone["name"],
            pretrained=backbone["pretrained"],
            revision=backbone["revision"],
            variant=backbone["variant"],
            config=backbone["config"],
            loras=[LoraConfig(weights=lora["weights"], scale=lora["scale"]) for lora in backbone["loras"]],
            dtype=backbone.get("weights_dtype", backbone["dtype"]),
            compile=backbone.get("compile", False),
        ),
        MethodConfig(
            views=ViewsConfig(**method["views"]),
            mad=MadConfig(**(method["mad"] or {"steps": 0})),
            sync=SyncConfig(**(method["sync"] or {})),
            regions=RegionsConfig(**(method["regions"] or {})),
        ),
        sampling["scheduler"],
        sampling["original_inference_steps"],
        device,
    )
    with sampler.in_float32() if backbone["dtype"] == "float32" else nullcontext():
        images = sampler.sample(
            [metadata["prompt"]],
            negative_prompts=[metadata["negative_prompt"]],
            height=metadata["height"],
            width=metadata["width"],
            num_inference_steps=sampling["num_inference_steps"],
            guidance_scale=sampling["guidance_scale"],
            guidance_steps=sampling.get("guidance_steps"),
            seeds=[metadata["seed"]],
            loop=sampling["loop"],
            regions=[[Region.from_dict(region) for region in metadata.get("regions", [])]],
            decode=sampling["decode"],
        )
    return np.asarray(images)[0], sampler


def _checked(image_HWC: np.ndarray, sampler: PanoramaSampler, metadata: dict[str, Any]) -> np.ndarray:
    """After the safety checker, where the sample was made with one."""
    recorded = metadata.get("safety")
    if recorded is None:
        return image_HWC
    safety = Safety.load(SafetyConfig(checker=recorded["checker"], action=recorded["action"]), sampler)
    assert safety is not None
    checked = safety(image_HWC)
    if checked.flagged != recorded["flagged"]:
        print(f"the safety checker flags {checked.flagged} now, and {recorded['flagged']} when the sample was made")
    return checked.image_HWC


def _check_same(where: str, here: str | None, recorded: str) -> None:
    if here != recorded:
        raise UserError(f"{where} holds other weights here ({here}) than the sample was made with ({recorded})")
