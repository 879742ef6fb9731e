"""`madgen fetch`: download everything a job needs, for compute nodes without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from madgen.config.schema import Job
from madgen.hub.adapters import download_controlnet, download_ip_adapter, ip_adapter_files, lora_file
from madgen.hub.auxiliary_models import download_checker, download_clip
from madgen.hub.weights import ModelFiles
from madgen.utils.console import plural, size_text
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user


def fetch(job: Job) -> None:
    """Download missing files and print their location. Raises UserError for the first that is not available."""
    from huggingface_hub import constants

    for name, paths in _needed(job):
        if not paths:
            print(f"{name}: local, nothing to download")
        for path in paths:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            print(f"{name}: {size_text(size)} in {plural(len(files), 'file')}, in {path}")
    if constants.HF_HUB_OFFLINE:
        print("HF_HUB_OFFLINE is set: nothing was downloaded, all files are cached")


def fetch_networks(extractor: str) -> None:
    """Download the networks of `madgen evaluate --extractor`. Raises UserError for the first that is not available."""
    import torch

    from madgen.metrics.extractors import Extractors, parse

    choice = parse(extractor)
    networks = Extractors(choice, torch.device("cpu"))
    for role in ("clip", "features", "lpips", "style", "dinov2"):
        if choice.get(role) != "none":
            print(f"--extractor {role}: {networks[role].label}, weights {networks[role].weights}")


def _needed(job: Job) -> Iterator[tuple[str, list[Path]]]:
    from madgen.backbones import backbone_module

    backbone = job.backbone
    files = ModelFiles.of(backbone.pretrained, backbone.revision, backbone.config, backbone.variant)
    yield f"backbone.pretrained={backbone.pretrained}", backbone_module(backbone.name).download(files)
    for lora in backbone.loras:
        local = expand_user(lora.weights, "backbone.loras: weights").exists()
        file = lora_file(lora.weights, download=True)
        if file is None:
            raise UserError(f"the LoRA {lora.weights} is not available")
        yield f"backbone.loras: {lora.weights}", [] if local else [file]
    if (control := backbone.controlnet.weights) is not None:
        yield f"backbone.controlnet.weights={control}", download_controlnet(control)
    if (adapter := ip_adapter_files(backbone.ip_adapter)) is not None:
        yield f"backbone.ip_adapter.weights={adapter.weights}", download_ip_adapter(adapter)
    if job.safety.checker is not None:
        yield f"safety.checker={job.safety.checker}", download_checker(job.safety.checker)
    if job.scores.clip is not None:
        yield f"scores.clip={job.scores.clip}", download_clip(job.scores.clip)
    if job.method.sync.weight > 0 and job.method.sync.network != "random":
        import torch

        from madgen.models.perceptual import lpips

        lpips(job.method.sync.network, torch.device("cpu"))
        yield f"method.sync.network={job.method.sync.network}", [Path(torch.hub.get_dir()) / "checkpoints"]
