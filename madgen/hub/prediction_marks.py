"""Read from a single weights file how its model was trained: v-prediction and zero terminal SNR.

ComfyUI and Forge read empty tensors named `v_pred` and `ztsnr`; kohya's scripts and the Stability AI model
specification write metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.hub.safetensors_file import Header, read_header
from madgen.utils.errors import UserError

NAMES = {
    "epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
    "v-prediction": "v_prediction", "v_pred": "v_prediction", "velocity": "v_prediction", "sample": "sample",
    "x0": "sample", "x": "sample",
}  # fmt: skip
"""Values of `modelspec.prediction_type`, as different tools write them."""
EDM = ("edm_mean", "edm_vpred.sigma_max")
"""Tensors that mark models of Karras et al.'s formulation, which need another preconditioning."""


@dataclass(frozen=True)
class Marks:
    """Statements of a weights file, each with its source, such as `tensor v_pred`."""

    predictions: dict[str, str]
    """Prediction types by source."""
    zero_snr: str | None = None
    """Source of the mark of zero terminal SNR."""
    edm: str | None = None


def marks_of(header: Header) -> Marks:
    """Read the marks from the names of a file's tensors and its metadata."""
    tensors, metadata = header.tensors, header.metadata
    predictions: dict[str, str] = {}
    if "v_pred" in tensors:
        predictions["tensor v_pred"] = "v_prediction"
    stated = str(metadata.get("modelspec.prediction_type", "")).strip().lower()
    if stated in NAMES:
        predictions[f"modelspec.prediction_type {stated}"] = NAMES[stated]
    architecture = str(metadata.get("modelspec.architecture", ""))
    if architecture.startswith("stable-diffusion-v2-768-v"):
        predictions[f"modelspec.architecture {architecture}"] = "v_prediction"
    if _is_true(metadata.get("ss_v_parameterization")):
        predictions["ss_v_parameterization"] = "v_prediction"
    edm = next((f"tensor {name}" for name in EDM if name in tensors), None)
    if "ztsnr" in tensors:
        return Marks(predictions, "tensor ztsnr", edm)
    zero_snr = "ss_zero_terminal_snr" if _is_true(metadata.get("ss_zero_terminal_snr")) else None
    return Marks(predictions, zero_snr, edm)


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1")


def scheduler_of_file(
    file: Path, own: dict[str, Any], config: str | None, prediction_type: str | None
) -> dict[str, Any]:
    """Return the scheduler's config `own` as the marks of a weights file demand it.

    `config` is `backbone.config`, which must not contradict the file; None: `own` was only inferred, and the file
    counts. `prediction_type` is the user's decision, with which contradicting marks are ignored. Raises UserError.
    """
    name = f"backbone.pretrained={file}"
    marks = marks_of(read_header(file, name))
    if marks.edm is not None and not str(own.get("_class_name", "")).startswith("EDM"):
        raise UserError(f"{name} is an EDM model ({marks.edm}), which is not supported as a single file")
    kinds = sorted(set(marks.predictions.values()))
    if prediction_type is not None:
        own = {**own, "prediction_type": prediction_type}
        follows = prediction_type != "epsilon" and (not kinds or prediction_type in kinds)
        return _zero_snr(own) if marks.zero_snr and follows else own
    if len(kinds) > 1:
        raise UserError(f"{name} contradicts itself: {_sources(marks)}; set backbone.prediction_type to one of them")
    wanted: dict[str, Any] = {"prediction_type": kinds[0]} if kinds else {}
    if marks.zero_snr:
        wanted["rescale_betas_zero_snr"] = True
    differing = [f"{key}={own[key]}" for key, value in wanted.items() if key in own and own[key] != value]
    if marks.zero_snr and {**own, **wanted}.get("prediction_type", "epsilon") == "epsilon":
        differing = differing or ["prediction_type=epsilon"]
    elif config is None:
        differing = []  # the config was inferred from tensor shapes, which do not show how a model was trained
    if differing:
        follow = kinds[0] if kinds else "v_prediction"
        raise UserError(
            f"{name} is marked otherwise ({_sources(marks)}) than the scheduler of its config files, which says "
            f"{', '.join(differing)}; set backbone.prediction_type={follow} to follow the file"
            + (f", or {own.get('prediction_type', 'epsilon')} to follow the config" if kinds else "")
        )
    own = {**own, **wanted}
    return _zero_snr(own) if marks.zero_snr else own


def _zero_snr(own: dict[str, Any]) -> dict[str, Any]:
    """Return a config with zero terminal SNR, sampled from the last timestep on (Lin et al., WACV 2024)."""
    return {**own, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _sources(marks: Marks) -> str:
    parts = [f"{source}: {kind}" for source, kind in marks.predictions.items()]
    return ", ".join(parts + ([f"{marks.zero_snr}: zero terminal SNR"] if marks.zero_snr else []))
